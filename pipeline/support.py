"""What a worker remembers of its users: support sets, adapters, recent event ids and seen items, in bounded memory.

A `UserTable` holds each user's state in one slot of preallocated arrays; Postgres holds the truth, so a slot may be
forgotten at any time. Two logs per user, event ids (for de-duplication) and seen items, keep their newest 32 to 63
entries in the slot; older ones live in immutable segments of 32, as in the database.

Letters: U users, S support slots, A adapter state size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.rate_limit import RateLimit

Ints = NDArray[np.int64]
Numbers = Sequence[int] | NDArray[np.generic]

SEGMENT = 32  # entries in an immutable segment of a log
TAIL = 2 * SEGMENT  # entries in the slot itself; reaching it moves the oldest SEGMENT out


def num_segments(num_entries: int) -> int:
    """How many immutable segments a log of that many entries has: a function of the length alone."""
    return max(0, num_entries // SEGMENT - 1)


def tail_length(num_entries: Ints) -> Ints:
    """Entries in the slot, for each log length: what is not in a segment. 0 … 63."""
    in_segments: Ints = SEGMENT * np.maximum(0, num_entries // SEGMENT - 1)
    return num_entries - in_segments


def occurrence(groups: Ints) -> Ints:
    """For each element, how many earlier ones are equal to it. [E] → [E]"""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(groups) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[first, len(groups)])
    within = np.arange(len(groups)) - np.repeat(first, counts)
    result = np.empty(len(groups), np.int64)
    result[order] = within
    return result


@dataclass(slots=True)
class Segments:
    """Segments that a micro-batch completed, to be written in its transaction."""

    user_ids: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    entries: list[tuple[NDArray[np.generic], ...]] = field(default_factory=list)

    def expired(self, horizon: int) -> list[int]:
        """For each user, the newest segment that the horizon has left behind; negative while there is none."""
        return [number - older_kept(horizon) // SEGMENT for number in self.numbers]


class UserTable:
    """States of up to `capacity` users; the least recently touched are forgotten first.

    Resident memory is `bytes_per_user * capacity`, plus 12 bytes for each older entry of users with long histories.
    """

    def __init__(
        self,
        capacity: int,
        *,
        support_size: int,
        state_size: int,
        id_horizon: int,
        seen_horizon: int,
        rate_limit: RateLimit | None = None,
    ) -> None:
        self.capacity, self.rate_limit = capacity, rate_limit
        self.id_horizon, self.seen_horizon = id_horizon, seen_horizon
        self.partition = np.full(capacity, -1, np.int32)
        self.last_offset = np.full(capacity, -1, np.int64)
        self.num_events = np.zeros(capacity, np.int64)  # K: positives
        self.num_applied = np.zeros(capacity, np.int64)
        self.num_seen = np.zeros(capacity, np.int64)
        self.support_items = np.zeros((capacity, support_size), np.int32)  # right-aligned, newest last; 0 = empty
        self.support_types = np.zeros((capacity, support_size), np.int8)
        self.adapter = np.zeros((capacity, state_size), np.float32)
        self.adapter_events = np.zeros(capacity, np.int64)
        self.track = np.zeros((capacity, 0), np.float32)  # what adapters have earned lately
        self.adapter_use = np.zeros(capacity, np.int64)  # what the last list was made with
        self.meta_version = np.zeros(capacity, np.int32)
        self.due_us = np.zeros(capacity, np.int64)  # when the events so far would be due at the permitted rate
        self.erased_ms = np.zeros(capacity, np.int64)  # Kafka's time of the wish to be forgotten; 0: none
        self.recent_ids = np.zeros((capacity, TAIL), np.int64)
        self.recent_bodies = np.zeros((capacity, TAIL), np.int32)
        self.recent_seen = np.zeros((capacity, TAIL), np.int32)  # +item_no had, -item_no dismissed
        self.older_ids: dict[int, tuple[NDArray[np.int64], NDArray[np.int32]]] = {}
        self.older_seen: dict[int, NDArray[np.int32]] = {}
        self._slot_of: dict[str, int] = {}
        self._user_of: list[str | None] = [None] * capacity
        self._touched = np.zeros(capacity, np.int64)
        self._tick = 0
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def bytes_per_user(self) -> int:
        """Bytes of one slot in the arrays."""
        arrays = (value for value in vars(self).values() if isinstance(value, np.ndarray))
        return sum(array.nbytes for array in arrays) // self.capacity

    def widen(self, state_size: int, track_size: int) -> None:
        """Make room for adapter states and tracks of these sizes; narrower ones are the first entries of their rows."""
        self.adapter = _widened(self.adapter, state_size)
        self.track = _widened(self.track, track_size)

    def missing(self, user_ids: Iterable[str]) -> list[str]:
        """Those of the users that have no slot."""
        return [user_id for user_id in user_ids if user_id not in self._slot_of]

    def slots(self, user_ids: Sequence[str]) -> Ints:
        """The slots of known users, marked as just used. KeyError for a user without one."""
        found = np.fromiter((self._slot_of[user_id] for user_id in user_ids), np.int64, len(user_ids))
        self._tick += 1
        self._touched[found] = self._tick
        return found

    def user_ids(self, slots: Ints) -> list[str]:
        """The users in these slots."""
        return [user_id for slot in slots.tolist() if (user_id := self._user_of[slot]) is not None]

    def admit(self, user_ids: Sequence[str], partitions: Sequence[int]) -> Ints:
        """Give users that have none an empty slot each, forgetting others where needed.

        Raises ValueError when more users are touched at once than the table can hold.
        """
        shortage = len(user_ids) - len(self._free)
        if shortage > 0:
            self._evict(shortage)
        admitted = [self._free.pop() for _ in user_ids]
        self._tick += 1
        slots = np.array(admitted, np.int64)
        for user_id, slot in zip(user_ids, admitted, strict=True):
            self._slot_of[user_id] = slot
            self._user_of[slot] = user_id
        self._clear(slots)
        self.partition[slots] = partitions
        self._touched[slots] = self._tick
        return slots

    def users(self) -> list[str]:
        """Everybody who has a slot."""
        return list(self._slot_of)

    def forget(self, user_ids: Iterable[str]) -> None:
        """Forget these users."""
        for user_id in user_ids:
            self._release(self._slot_of[user_id])

    def forget_partition(self, partition: int) -> None:
        """Forget every user of a partition: somebody else may have written them."""
        for slot in np.flatnonzero(self.partition == partition).tolist():
            self._release(slot)

    def spend(self, slots: Ints, record_ms: Ints) -> None:
        """Count applied events of these users against the rate limit, where there is one; a user's oldest first."""
        if self.rate_limit is not None:
            self.rate_limit.spend(self.due_us, slots, record_ms)

    def append_positive(self, slots: Ints, item_nos: Ints, types: Ints) -> None:
        """Push positives onto the support sets of these users; a user's come oldest first."""
        users, user, counts = np.unique(slots, return_inverse=True, return_counts=True)
        size = self.support_items.shape[1]
        moved = np.minimum(np.arange(size) + counts[:, None], size - 1)
        place = size - counts[user] + occurrence(slots)
        kept = place >= 0
        for array, values in ((self.support_items, item_nos), (self.support_types, types)):
            rows = np.take_along_axis(array[users], moved, 1)
            rows[user[kept], place[kept]] = values[kept]
            array[users] = rows
        self.num_events[users] += counts

    def append_ids(self, slots: Ints, ids: Ints, bodies: Ints, segments: Segments) -> None:
        """Remember event ids (and the hashes of their bodies) of these users; a user's come oldest first."""
        log = (self.recent_ids, self.recent_bodies)
        self._append(log, self.num_applied, slots, (ids, bodies), segments, self.restore_ids)

    def append_seen(self, slots: Ints, marks: Ints, segments: Segments) -> None:
        """Remember items had (+item_no) or dismissed (-item_no) by these users; a user's come oldest first."""
        self._append((self.recent_seen,), self.num_seen, slots, (marks,), segments, self.restore_seen)

    def seen(self, slot: int) -> NDArray[np.int32]:
        """The newest `seen_horizon` marks of a user, oldest first."""
        length = int(self.num_seen[slot])
        tail = self.recent_seen[slot, : length - SEGMENT * num_segments(length)]
        older = self.older_seen.get(slot)
        marks = tail if older is None else np.concatenate([older, tail])
        return marks[-self.seen_horizon :]

    def ids(self, slot: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The event ids that count as remembered (newest `id_horizon`, oldest first), with their body hashes."""
        length = int(self.num_applied[slot])
        length -= SEGMENT * num_segments(length)
        ids, bodies = self.recent_ids[slot, :length], self.recent_bodies[slot, :length]
        older = self.older_ids.get(slot)
        if older is not None:
            ids, bodies = np.concatenate([older[0], ids]), np.concatenate([older[1], bodies])
        return ids[-self.id_horizon :], bodies[-self.id_horizon :]

    def restore(self, slots: Ints, rows: Sequence[tuple[Any, ...]]) -> None:
        """Fill slots from rows (user_id, partition, last_offset, num_events, num_applied, support_items, support_types,
        adapter, track, adapter_events, meta_version, recent_ids, recent_bodies, recent_seen, num_seen, due_us).
        """
        self.widen(*(max((len(row[place]) for row in rows), default=0) for place in (7, 8)))
        for slot, row in zip(slots.tolist(), rows, strict=True):
            (_, _, self.last_offset[slot], self.num_events[slot], self.num_applied[slot], items, types, adapter) = row[
                :8
            ]
            track, self.adapter_events[slot], self.meta_version[slot], ids, bodies, seen = row[8:14]
            self.num_seen[slot], self.due_us[slot] = row[14:]
            kept = min(len(items), self.support_items.shape[1])
            if kept:
                self.support_items[slot, -kept:], self.support_types[slot, -kept:] = items[-kept:], types[-kept:]
            self.adapter[slot, : len(adapter)], self.track[slot, : len(track)] = adapter, track
            self.recent_ids[slot, : len(ids)], self.recent_bodies[slot, : len(ids)] = ids, bodies
            self.recent_seen[slot, : len(seen)] = seen

    def restore_ids(self, slot: int, ids: Numbers, bodies: Numbers) -> None:
        """Add one older segment of event ids, oldest segment first."""
        old = self.older_ids.get(slot, (np.zeros(0, np.int64), np.zeros(0, np.int32)))
        self.older_ids[slot] = (
            np.concatenate([old[0], np.array(ids, np.int64)])[-older_kept(self.id_horizon) :],
            np.concatenate([old[1], np.array(bodies, np.int32)])[-older_kept(self.id_horizon) :],
        )

    def restore_seen(self, slot: int, items: Numbers) -> None:
        """Add one older segment of seen items, oldest segment first."""
        old = self.older_seen.get(slot, np.zeros(0, np.int32))
        self.older_seen[slot] = np.concatenate([old, np.array(items, np.int32)])[-older_kept(self.seen_horizon) :]

    def _append(
        self,
        log: tuple[NDArray[Any], ...],
        lengths: Ints,
        slots: Ints,
        columns: tuple[Ints, ...],
        segments: Segments,
        restore: Callable[..., None],
    ) -> None:
        """Append to the tails of a log; tails that fill up move segments out, by `restore` and into `segments`."""
        place = tail_length(lengths[slots]) + occurrence(slots)
        full = np.isin(slots, slots[place + 1 >= TAIL])
        for array, column in zip(log, columns, strict=True):
            array[slots[~full], place[~full]] = column[~full]
        for slot in np.unique(slots[full]).tolist():
            tail, mine = int(tail_length(lengths[slot : slot + 1])[0]), slots == slot
            entries = [
                np.r_[array[slot, :tail], column[mine].astype(array.dtype)]
                for array, column in zip(log, columns, strict=True)
            ]
            first, length = num_segments(int(lengths[slot])), int(lengths[slot]) + int(mine.sum())
            for number in range(first, num_segments(length)):
                spilled = tuple(column[:SEGMENT].copy() for column in entries)
                entries = [column[SEGMENT:] for column in entries]
                restore(slot, *spilled)
                self._record(segments, slot, number, spilled)
            for array, column in zip(log, entries, strict=True):
                array[slot, : len(column)] = column
        np.add.at(lengths, slots, 1)

    def _record(self, segments: Segments, slot: int, number: int, entries: tuple[NDArray[np.generic], ...]) -> None:
        user_id = self._user_of[slot]
        if user_id is not None:
            segments.user_ids.append(user_id)
            segments.numbers.append(number)
            segments.entries.append(entries)

    def _evict(self, shortage: int) -> None:
        used = np.fromiter(self._slot_of.values(), np.int64, len(self._slot_of))
        idle = used[self._touched[used] < self._tick]
        if len(idle) < shortage:
            raise ValueError(f"a micro-batch touches more users than INNERLOOP_CACHE_USERS={self.capacity}")
        number = max(shortage, self.capacity // 16)  # a sixteenth at a time, so that sorting is rare
        for slot in idle[np.argsort(self._touched[idle], kind="stable")[:number]].tolist():
            self._release(slot)

    def _release(self, slot: int) -> None:
        user_id = self._user_of[slot]
        if user_id is None:
            return
        del self._slot_of[user_id]
        self._user_of[slot] = None
        self.partition[slot] = -1
        self.older_ids.pop(slot, None)
        self.older_seen.pop(slot, None)
        self._free.append(slot)

    def _clear(self, slots: Ints) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and name != "_touched":
                value[slots] = 0
        self.last_offset[slots] = -1


def _widened(rows: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    missing = size - rows.shape[1]
    return np.pad(rows, ((0, 0), (0, missing))) if missing > 0 else rows


def older_kept(horizon: int) -> int:
    """Entries kept beside the tail so that `horizon` are always at hand, in whole segments."""
    return -(-horizon // SEGMENT) * SEGMENT
