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


def fetch(first: int, last: int, partition: int = 0) -> Fetch:
    return Fetch([records(first, last, partition)])


async def opened(positions: dict[int, int], *, max_records: int = 100) -> Inbox:
    inbox = Inbox(max_records=max_records)
    await inbox.reopen({("interactions", partition): offset for partition, offset in positions.items()})
    return inbox


def spans(chunks: Sequence[Chunk]) -> list[tuple[int, int, int]]:
    return [(one.partition, one.start, one.next_offset) for one in chunks]


def test_each_chunk_begins_where_the_one_before_it_ended() -> None:
    async def scenario() -> None:
        inbox = await opened({0: 3, 1: 0})
        for one in (fetch(0, 3), fetch(0, 5), fetch(0, 2, partition=1), fetch(4, 8), fetch(0, 1, partition=2)):
            await inbox.put(one)
        chunks = await inbox.take()
        assert spans(chunks) == [(0, 3, 5), (1, 0, 2), (0, 5, 8)]
        assert [[row.offset for row in one.records] for one in chunks] == [[3, 4], [0, 1], [5, 6, 7]]
        assert not inbox.has_gap

    asyncio.run(scenario())


def test_what_is_behind_a_gap_is_dropped_until_the_consumer_has_been_sought_again() -> None:
    async def scenario() -> None:
        inbox = await opened({0: 0, 1: 0})
        await inbox.put(fetch(0, 3))
        await inbox.put(Fetch([records(5, 8), records(0, 2, partition=1)]))
        assert spans(await inbox.take()) == [(0, 0, 3), (1, 0, 2)]
        assert inbox.has_gap
        await inbox.put(fetch(3, 5))
        await inbox.reopen({("interactions", 0): 3})
        await inbox.put(fetch(3, 8))
        assert spans(await inbox.take()) == [(0, 3, 8)]

    asyncio.run(scenario())


def test_offsets_without_a_record_follow_on_where_they_were_asked_for() -> None:
    async def scenario() -> None:
        inbox = await opened({0: 2})
        rows = [record(event("u", "i", f"e{n}"), n) for n in (1, 4)]
        await inbox.put(Fetch([Chunk("interactions", 0, 1, 6, rows)]))
        await inbox.put(Fetch([Chunk("interactions", 0, 6, 7, [])]))
        await inbox.put(fetch(7, 8))
        chunks = await inbox.take()
        assert spans(chunks) == [(0, 2, 6), (0, 6, 7), (0, 7, 8)]
        assert [row.offset for one in chunks for row in one.records] == [4, 7]

    asyncio.run(scenario())


def test_a_fetch_that_waited_for_room_is_dropped_with_what_was_before_it() -> None:
    async def scenario() -> None:
        inbox = await opened({0: 0}, max_records=2)
        await inbox.put(fetch(0, 4))
        waits = asyncio.create_task(inbox.put(fetch(4, 8)))
        await asyncio.sleep(0)
        assert not waits.done()
        await inbox.close()
        await waits
        await inbox.put(fetch(0, 4))
        await inbox.reopen({("interactions", 0): 0})
        await inbox.put(fetch(0, 2))
        assert spans(await inbox.take()) == [(0, 0, 2)]

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
