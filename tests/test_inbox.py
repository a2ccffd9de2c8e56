"""Between the fetcher and the inner loop: nothing is taken from behind a gap, and no batch is larger than it may be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pipeline.chunks import Chunk, Fetch, cut
from pipeline.inbox import Inbox
from tests.factories import chunk, event, record


def records(first: int, last: int, partition: int = 0) -> Chunk:
    return chunk([record(event("u", "i", f"e{n}"), n, partition=partition) for n in range(first, last)])


def fetch(first: int, last: int, generation: int = 1) -> Fetch:
    return Fetch(generation, [records(first, last)])


def spans(chunks: Sequence[Chunk]) -> list[tuple[int, int, int]]:
    return [(one.partition, one.start, one.next_offset) for one in chunks]


def test_a_fetch_of_an_older_generation_is_dropped() -> None:
    async def scenario() -> None:
        inbox = Inbox(max_records=100)
        await inbox.put(fetch(0, 5, generation=1))
        await inbox.put(fetch(3, 6, generation=2))
        assert spans(await inbox.take(lambda: 2)) == [(0, 3, 6)]

    asyncio.run(scenario())


def test_a_fetch_that_waited_for_room_is_dropped_with_what_was_before_it() -> None:
    async def scenario() -> None:
        inbox = Inbox(max_records=2)
        await inbox.put(fetch(0, 4))
        behind_the_gap = asyncio.create_task(inbox.put(fetch(4, 8)))
        await asyncio.sleep(0)
        assert not behind_the_gap.done()
        await inbox.close()
        await behind_the_gap
        await inbox.put(fetch(8, 12))
        await inbox.reopen()
        await inbox.put(fetch(0, 2))
        assert spans(await inbox.take(lambda: 1)) == [(0, 0, 2)]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("num_records", "now"),
    [
        (0, []),
        (3, [(0, 0, 3)]),
        (5, [(0, 0, 5)]),
        (7, [(0, 0, 5), (1, 10, 12)]),
        (99, [(0, 0, 5), (1, 10, 15), (0, 5, 8)]),
    ],
)
def test_a_cut_keeps_order_and_leaves_no_gap(num_records: int, now: list[tuple[int, int, int]]) -> None:
    chunks = [records(0, 5), records(10, 15, partition=1), records(5, 8)]
    first, rest = cut(chunks, num_records)
    assert spans(first) == now
    joined = [row.offset for one in [*first, *rest] for row in one.records]
    assert joined == [row.offset for one in chunks for row in one.records]
    assert all(one.start <= one.records[0].offset < one.next_offset for one in [*first, *rest])


def test_offsets_without_a_record_before_a_cut_belong_to_what_follows() -> None:
    rows = [record(event("u", "i", f"e{n}"), n) for n in (2, 3, 7)]
    first, rest = cut([Chunk("interactions", 0, 0, 9, rows)], 2)
    assert spans([*first, *rest]) == [(0, 0, 4), (0, 4, 9)]
