"""From records to fates: decode a micro-batch, number each user's events, and tell new events from repeated ones.

Pure functions over records and a `UserTable`; whatever is decided here depends on the records, their partition's
earlier log and nothing else, so that a log gives the same rows however it is cut into batches.

Letters: E events of the micro-batch, in the order of (partition, offset).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.chunks import Chunk, Record
from pipeline.support import Ints, UserTable, occurrence
from schemas.events import Interaction, Rejected

E = TypeVar("E")
Parse = Callable[[bytes | None, bytes | None, int], E | Rejected]

APPLIED, DUPLICATE, CONFLICTING, FOREIGN, ERASED, LIMITED = 0, 1, 2, 3, 4, 5  # fates of a well-formed event


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that can never be applied, and why."""

    topic: str
    partition: int
    offset: int
    reason: str
    detail: str
    key: bytes | None
    payload: bytes | None
    record_ms: int


@dataclass(slots=True)
class Advance:
    """How far one partition moves, and the fates of the offsets it passes: they add up to the distance.

    Of those dropped, `rate_limited` were their user's too many within a minute.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    applied: int = 0
    dead_lettered: int = 0
    duplicates: int = 0
    dropped: int = 0
    skipped: int = 0
    rate_limited: int = 0


@dataclass(slots=True)
class MicroBatch:
    """The well-formed events of a micro-batch as columns [E], what was rejected, and how far each partition moves.

    `users` are those of all its events, also of events that are not applied.
    """

    advances: list[Advance] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    events: list[Interaction] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    partition: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    offset: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    record_ms: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    users: list[str] = field(default_factory=list)

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Leave only these events."""
        self.take(np.flatnonzero(chosen))

    def take(self, indices: Ints) -> None:
        """Leave these events, in this order."""
        self.events = [self.events[index] for index in indices.tolist()]
        self.records = [self.records[index] for index in indices.tolist()]
        self.partition, self.offset = self.partition[indices], self.offset[indices]
        self.record_ms = self.record_ms[indices]


@dataclass(slots=True)
class Walk(Generic[E]):
    """Records of one topic from the positions on: what they hold, what was rejected, how far each partition moves."""

    advances: list[Advance] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    events: list[E] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def walk(chunks: Iterable[Chunk], positions: Mapping[int, int], parse: Parse[E]) -> Walk[E]:
    """Decode the chunks' records from the positions on.

    Args:
        chunks: of one topic; several of a partition follow one another.
        positions: next offset to apply, by partition.
        parse: (key, value, Kafka timestamp in ms) → event or rejection; total.

    Raises:
        LostRecords: a chunk starts beyond its partition's position.

    """
    found = Walk[E]()
    for chunk in chunks:
        advance = _advance_for(found.advances, chunk, positions[chunk.partition])
        for record in chunk.records:
            if record.offset < advance.next_offset:
                continue  # fetched again after a seek: already applied
            advance.skipped += record.offset - advance.next_offset
            advance.next_offset = record.offset + 1
            event = parse(record.key, record.value, record.timestamp)
            if isinstance(event, Rejected):
                advance.dead_lettered += 1
                found.dead_letters.append(dead_letter(record, event.reason, event.detail))
            else:
                found.events.append(event)
                found.records.append(record)
        advance.skipped += max(0, chunk.next_offset - advance.next_offset)
        advance.next_offset = max(chunk.next_offset, advance.next_offset)
    found.advances = [advance for advance in found.advances if advance.next_offset > advance.start]
    return found


def micro_batch(chunks: Iterable[Chunk], positions: Mapping[int, int], parse: Parse[Interaction]) -> MicroBatch:
    """`walk` over interactions, their events in the order of (partition, offset)."""
    found = walk(chunks, positions, parse)
    batch = MicroBatch(found.advances, found.dead_letters, found.events, found.records)
    places = [(record.partition, record.offset, record.timestamp) for record in batch.records]
    batch.partition, batch.offset, batch.record_ms = np.array(places, np.int64).reshape(-1, 3).T
    batch.take(np.lexsort((batch.offset, batch.partition)))
    return batch


class LostRecords(Exception):
    """A chunk between the position and this one never arrived; the inbox lets none through. Stop: a restart seeks."""


def fates(batch: MicroBatch, slots: Ints, table: UserTable) -> Ints:
    """APPLIED, DUPLICATE, CONFLICTING, FOREIGN, ERASED or LIMITED for each event. [E]

    An event id is remembered for its user's last `id_horizon` applied events: the same id with the same body is a
    duplicate, with another body a conflict; neither is remembered again. A user lives in the partition of the first
    event; one that turns up in another (a foreign partitioner) is FOREIGN there. What happened, or was recorded, before
    its user asked to be forgotten is ERASED, however late it comes. What the table's rate limit does not admit is
    LIMITED; neither its id nor its time is remembered.

    `slots` [E] are those of the events' users.
    """
    result = np.where(table.partition[slots] == batch.partition, APPLIED, FOREIGN).astype(np.int64)
    if not len(slots):
        return result
    result[_erased(batch, table.erased_ms[slots])] = ERASED
    ids = np.fromiter((event.id_hash for event in batch.events), np.int64, len(slots))
    suspects = _users_with_suspects(slots, ids, table)
    if table.rate_limit is not None:
        over = table.rate_limit.suspects(table.due_us, slots, batch.record_ms)
        suspects |= np.isin(slots, list(over)) & (occurrence(slots) == 0)
    for index in np.flatnonzero(suspects).tolist():
        _settle(index, batch, slots, table, result)
    return result


def _erased(batch: MicroBatch, erased_ms: Ints) -> Ints:
    """Events from before their users' wishes, by their own time or by Kafka's; nearly always none."""
    asked = np.flatnonzero(erased_ms > 0)
    times = np.fromiter((batch.events[index].ts_ms for index in asked.tolist()), np.int64, len(asked))
    return asked[np.minimum(times, batch.record_ms[asked]) <= erased_ms[asked]]


def _users_with_suspects(slots: Ints, ids: Ints, table: UserTable) -> NDArray[np.bool_]:
    """First events (a mask [E]) of the users of whom some event may repeat another: these are settled one by one."""
    suspect: NDArray[np.bool_] = (table.recent_ids[slots] == ids[:, None]).any(1)
    order = np.lexsort((ids, slots))
    ordered = slots[order]
    again = (ordered[1:] == ordered[:-1]) & (ids[order][1:] == ids[order][:-1])
    suspect[order[1:][again]] = True
    long = np.array(sorted(set(slots.tolist()) & table.older_ids.keys()), np.int64)
    ends = (np.searchsorted(ordered, long, side=side).tolist() for side in ("left", "right"))
    for slot, start, end in zip(long.tolist(), *ends, strict=True):
        of_user = order[start:end]
        suspect[of_user] |= (table.older_ids[slot][0] == ids[of_user, None]).any(1)
    if not suspect.any():
        return suspect
    first = occurrence(slots) == 0
    chosen: NDArray[np.bool_] = first & np.isin(slots, slots[suspect])
    return chosen


def _settle(first: int, batch: MicroBatch, slots: Ints, table: UserTable, result: Ints) -> None:
    """Decide one user's events in order."""
    slot = int(slots[first])
    ids, bodies = table.ids(slot)
    num_applied, due_us = int(table.num_applied[slot]), int(table.due_us[slot])
    known = dict(
        zip(ids.tolist(), zip(range(num_applied - len(ids), num_applied), bodies.tolist(), strict=True), strict=True)
    )
    for index in np.flatnonzero(slots == slot).tolist():
        if result[index] != APPLIED:
            continue
        event = batch.events[index]
        ordinal, body = known.get(event.id_hash, (-1, 0))
        if ordinal >= 0 and num_applied - ordinal <= table.id_horizon:
            result[index] = DUPLICATE if body == event.body_hash else CONFLICTING
            continue
        if table.rate_limit is not None:
            at_us = int(batch.record_ms[index]) * 1000
            if not table.rate_limit.admits(due_us, at_us):
                result[index] = LIMITED
                continue
            due_us = table.rate_limit.after(due_us, at_us)
        known[event.id_hash] = (num_applied, event.body_hash)
        num_applied += 1


def _advance_for(advances: list[Advance], chunk: Chunk, position: int) -> Advance:
    for advance in advances:
        if advance.partition == chunk.partition:
            break
    else:
        advance = Advance(chunk.topic, chunk.partition, position, position)
        advances.append(advance)
    if chunk.start > advance.next_offset:
        raise LostRecords(f"{chunk.topic}[{chunk.partition}]: at {advance.next_offset}, fetched from {chunk.start}")
    return advance


def dead_letter(record: Record, reason: str, detail: str) -> DeadLetter:
    """Why this record can never be applied."""
    return DeadLetter(
        record.topic, record.partition, record.offset, reason, detail, record.key, record.value, record.timestamp
    )
