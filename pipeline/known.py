"""What a prediction may know of a user: the support set and the items seen before the event.

Letters: E events, U users, S support slots, X marks of all of these users together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.support import TAIL, Ints, UserTable, tail_length


@dataclass(slots=True)
class Known:
    """What predictions for U users may know: support sets [U, S], 0 where none, and seen or dismissed items.

    marks: [X] +item_no had, -item_no dismissed, user after user; num_marks: [U] how many are whose.
    """

    support_items: NDArray[np.int32]
    support_types: NDArray[np.int8]
    marks: NDArray[np.int32]
    num_marks: Ints

    @classmethod
    def of(cls, table: UserTable, slots: Ints) -> Known:
        """As the users' memory is now."""
        return cls(table.support_items[slots], table.support_types[slots], *_seen(table, slots))


class Before:
    """What was known before each of E events, each user's oldest first: memory as it is now, and the batch itself."""

    def __init__(
        self, table: UserTable, slots: Ints, columns: tuple[Ints, Ints], *, positive: NDArray[np.bool_], marks: Ints
    ) -> None:
        """Lay out what the events' users had. columns: item number and type [E]; marks: [E] ±item, 0 where none."""
        users, user = np.unique(slots, return_inverse=True)
        size = table.support_items.shape[1]
        full = np.full(len(users), size)
        self._size, self._horizon = size, table.seen_horizon
        support = table.support_items[users].ravel(), table.support_types[users].ravel()
        self._support = _Stretches.of(user, positive, columns, support, full)
        seen, num_seen = _seen(table, users)
        self._marks = _Stretches.of(user, marks != 0, (marks,), (seen,), num_seen)

    def newest_items(self, events: Ints, width: int) -> NDArray[np.int32]:
        """The newest positives before these events, right-aligned, 0 where there were fewer.

        [len(events), width] or as wide as the support set: a large batch must not know more than small ones.
        """
        return self._support.newest(events, min(width, self._size))[0]

    def of(self, events: Ints) -> Known:
        """What was known before these events, in their order."""
        items, types = self._support.newest(events, self._size)
        return Known(items, types.astype(np.int8), *self._marks.ragged(events, self._horizon))


@dataclass(frozen=True, slots=True)
class _Stretches:
    """One stretch of flat arrays for each user: the entries there were, then those of the batch, oldest first.

    Attributes:
        columns: one array [L] or several beside each other, all stretches.
        start, end: [E] where the stretch of an event's user begins, and where it ended before the event.

    """

    columns: tuple[NDArray[np.int32], ...]
    start: Ints
    end: Ints

    @classmethod
    def of(
        cls,
        user: Ints,
        adds: NDArray[np.bool_],
        values: tuple[Ints, ...],
        old: tuple[NDArray[np.integer], ...],
        lengths: Ints,
    ) -> _Stretches:
        """user, adds, values: [E] whose event, whether it adds an entry, which; old: users' entries, `lengths` [U]."""
        added = np.bincount(user[adds], minlength=len(lengths))
        starts = np.cumsum(lengths + added) - lengths - added
        end = starts[user] + lengths[user] + earlier(user, adds)
        had = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(len(old[0]))
        columns = tuple(np.zeros(len(had) + int(added.sum()), np.int32) for _ in old)
        for column, before, new in zip(columns, old, values, strict=True):
            column[had], column[end[adds]] = before, new[adds]
        return cls(columns, starts[user], end)

    def ragged(self, events: Ints, limit: int) -> tuple[NDArray[np.int32], Ints]:
        """The newest entries before these events, `limit` each at most: one after the other, and how many are whose."""
        lengths: Ints = np.minimum(self.end[events] - self.start[events], limit)
        ends = np.cumsum(lengths)
        place = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.end[events] - ends, lengths)
        return self.columns[0][place], lengths

    def newest(self, events: Ints, width: int) -> list[NDArray[np.int32]]:
        """The newest entries before these events [len(events), width], right-aligned, 0 where there were fewer."""
        place = self.end[events][:, None] + np.arange(-width, 0)
        absent = place < self.start[events][:, None]
        place[absent] = 0
        found = [column[place] for column in self.columns]
        for column in found:
            column[absent] = 0
        return found


def earlier(groups: Ints, counted: NDArray[np.bool_]) -> Ints:
    """For each element, how many earlier ones of its group are counted. [E]"""
    order = np.argsort(groups, kind="stable")
    running: Ints = np.cumsum(counted[order]) - counted[order]
    ordered = groups[order]
    start = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(groups) else np.zeros(0, np.int64)
    sizes = np.diff(np.r_[start, len(groups)])
    result = np.empty(len(groups), np.int64)
    result[order] = running - np.repeat(running[start] if len(start) else start, sizes)
    return result


def _seen(table: UserTable, slots: Ints) -> tuple[NDArray[np.int32], Ints]:
    """Seen (+item_no) and dismissed (-item_no) items of these users, one after the other, and how many are whose."""
    lengths = table.num_seen[slots]
    in_slot = np.arange(TAIL) < tail_length(lengths)[:, None]
    recent = table.recent_seen[slots]
    long = np.flatnonzero(lengths >= TAIL).tolist()
    if not long:
        return recent[in_slot], lengths
    # Few users have more than their slots hold: those between two of them are taken at once.
    parts, first = list[NDArray[np.int32]](), 0
    for place in long:
        parts += [recent[first:place][in_slot[first:place]], table.seen(int(slots[place]))]
        first = place + 1
    parts.append(recent[first:][in_slot[first:]])
    return np.concatenate(parts), np.minimum(lengths, table.seen_horizon)
