"""Fates and numbering of a micro-batch, without a database."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.batching import APPLIED, CONFLICTING, DUPLICATE, LostRecords, fates, micro_batch
from pipeline.chunks import Chunk
from pipeline.support import Segments, UserTable, occurrence
from schemas.events import parse_interaction
from tests.factories import chunk, event, record


def test_occurrence_counts_earlier_equals() -> None:
    assert occurrence(np.array([5, 3, 5, 5, 3, 9])).tolist() == [0, 0, 1, 2, 1, 0]
    assert occurrence(np.zeros(0, np.int64)).tolist() == []


def test_records_below_the_position_are_not_read_again() -> None:
    records = [record(event("u", "i", f"e{n}"), n) for n in range(5)]
    batch = micro_batch([chunk(records)], {0: 3}, parse_interaction)
    assert batch.offset.tolist() == [3, 4]
    assert (batch.advances[0].start, batch.advances[0].next_offset) == (3, 5)


def test_a_chunk_beyond_the_position_means_that_records_were_lost() -> None:
    with pytest.raises(LostRecords):
        micro_batch([chunk([record(event("u", "i", "e"), 7)])], {0: 5}, parse_interaction)


def test_offsets_that_were_read_and_hold_no_record_are_skipped_and_passed() -> None:
    records = [record(event("u", "i", f"e{n}"), n) for n in (3, 6)]
    batch = micro_batch([Chunk("interactions", 0, 2, 9, records)], {0: 2}, parse_interaction)
    (advance,) = batch.advances
    assert (advance.start, advance.next_offset, advance.skipped) == (2, 9, 5)
    (advance,) = micro_batch([Chunk("interactions", 0, 9, 11, [])], {0: 9}, parse_interaction).advances
    assert (advance.start, advance.next_offset, advance.skipped) == (9, 11, 2)


def test_events_are_ordered_by_partition_and_offset_however_they_were_fetched() -> None:
    later = [record(event("u", "i", "a"), 2), record(event("u", "i", "b"), 3)]
    other = [record(event("v", "i", "c"), 0, partition=1)]
    first = [record(event("u", "i", "d"), 0), record(event("u", "i", "e"), 1)]
    batch = micro_batch([chunk(first), chunk(other), chunk(later)], {0: 0, 1: 0}, parse_interaction)
    assert [event.event_id for event in batch.events] == ["d", "e", "a", "b", "c"]
    assert {advance.partition: advance.next_offset for advance in batch.advances} == {0: 4, 1: 1}


def decide(rows: list[tuple[str, str, str]], *, horizon: int = 1000, stored: int = 0) -> list[int]:
    """Fates of (user, event id, item) rows after `stored` events old-0, old-1, … of the user u with the item i."""
    table = UserTable(8, support_size=3, state_size=1, id_horizon=horizon, seen_horizon=10)
    table.admit(sorted({row[0] for row in rows} | {"u"}), [0] * len({row[0] for row in rows} | {"u"}))
    for number in range(stored):
        old = parse_interaction(b"u", event("u", "i", f"old-{number}"), 2**41)
        slots = table.slots(["u"])
        table.append_ids(slots, np.array([old.id_hash]), np.array([old.body_hash]), Segments())  # type: ignore[union-attr]
    records = [record(event(user, item, name), n) for n, (user, name, item) in enumerate(rows)]
    batch = micro_batch([chunk(records)], {0: 0}, parse_interaction)
    decided: list[int] = fates(batch, table.slots([event.user_id for event in batch.events]), table).tolist()
    return decided


def test_the_same_id_and_body_is_a_duplicate_another_body_a_conflict() -> None:
    rows = [("u", "a", "i"), ("u", "a", "i"), ("u", "a", "other"), ("v", "a", "i"), ("u", "b", "i")]
    assert decide(rows) == [APPLIED, DUPLICATE, CONFLICTING, APPLIED, APPLIED]


@pytest.mark.parametrize("stored", [3, 40, 70, 200])
def test_stored_ids_are_known_wherever_they_lie(stored: int) -> None:
    rows = [
        ("u", "old-0", "i"),
        ("u", f"old-{stored - 1}", "i"),
        ("u", f"old-{stored // 2}", "else"),
        ("u", "new", "i"),
    ]
    assert decide(rows, stored=stored) == [DUPLICATE, DUPLICATE, CONFLICTING, APPLIED]


def test_an_id_is_forgotten_exactly_after_its_horizon() -> None:
    # 100 ids are remembered; before this event the user has 100 applied ones, old-0 being the oldest that counts
    assert decide([("u", "old-0", "i")], horizon=100, stored=100) == [DUPLICATE]
    assert decide([("u", "old-0", "i")], horizon=100, stored=101) == [APPLIED]
    # the same inside one batch: one more event pushes it out
    assert decide([("u", "new", "i"), ("u", "old-0", "i")], horizon=100, stored=100) == [APPLIED, APPLIED]
    assert decide([("u", "old-5", "i"), ("u", "old-0", "i")], horizon=100, stored=100) == [DUPLICATE, DUPLICATE]
