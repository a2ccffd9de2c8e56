"""What aiokafka hands out is told by the offsets that were asked for, whatever seeks come in between."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Iterable
from types import SimpleNamespace
from typing import Any

from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from faust.types import TP

from pipeline.chunks import Chunk
from pipeline.transport import _ConsumerThread

PARTITION = TP("interactions", 0)
CONTROL = 0x20  # attribute of a batch that holds a transaction's marker


def batch(base: int, offsets: Iterable[int], *, attributes: int = 0) -> bytes:
    """A record batch whose offsets begin at `base`; the offsets left out were compacted away."""
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 10_000)
    for offset in offsets:
        assert builder.append(offset - base, 1000, b"u", b"{}", [])
    made = bytearray(builder.build())
    struct.pack_into(">q", made, 0, base)
    struct.pack_into(">h", made, 21, attributes)
    return bytes(made)


class Consumer:
    """aiokafka's fetcher with its positions, over a partition that answers each request with what `answer` gives."""

    def __init__(self, answer: Callable[[int], bytes]) -> None:
        subscriptions = SubscriptionState()
        subscriptions.assign_from_user([PARTITION])
        client = SimpleNamespace(_loop=asyncio.get_running_loop(), _metadata_max_age_ms=1000, send=self._send)
        self._fetcher = Fetcher(client, subscriptions, check_crcs=False)
        self._fetcher._fetch_task.cancel()  # requests are made by hand
        self._closed = False
        self._answer = answer
        self._assignment = subscriptions.subscription.assignment
        self.thread = _ConsumerThread.__new__(_ConsumerThread)
        self.thread.consumer = SimpleNamespace(flow_active=True)
        self.thread._consumer = self

    def seek(self, partition: TP, offset: int) -> None:
        self._fetcher.seek_to(partition, offset)

    def assignment(self) -> set[TP]:
        return {PARTITION}

    async def request(self, before_answer: Callable[[], Any] = lambda: None) -> None:
        """One request from where the position is, as aiokafka makes them in the background."""
        position = self._assignment.state_value(PARTITION).position
        request = SimpleNamespace(topics=[(PARTITION.topic, [(PARTITION.partition, position, 1000)])])
        self._before_answer = before_answer
        if await self._fetcher._proc_fetch_request(self._assignment, 0, request):
            for waiter in list(self._fetcher._fetch_waiters):
                self._fetcher._notify(waiter)

    async def _send(self, _: int, request: Any) -> Any:
        ((topic, ((partition, offset, _size),)),) = request.topics
        records = self._answer(offset)
        self._before_answer()
        return SimpleNamespace(API_VERSION=4, topics=[(topic, [(partition, 0, 100, 100, None, records)])])

    async def fetched(self, *, timeout: float = 0.0, most: int = 100) -> tuple[int, int, list[int]] | None:
        """Start, next offset and records' offsets of what there is."""
        chunk: Chunk | None = (await self.thread._fetch_records(self, {PARTITION}, timeout, most)).get(PARTITION)
        return (chunk.start, chunk.next_offset, [record.offset for record in chunk.records]) if chunk else None


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        await scenario()

    asyncio.run(all_of_it())


def test_a_chunk_spans_what_was_asked_for_and_what_was_read() -> None:
    async def scenario() -> None:
        consumer = Consumer(lambda offset: batch(5, [6, 8, 9]) if offset < 10 else batch(10, [10], attributes=CONTROL))
        consumer.seek(PARTITION, 4)
        await consumer.request()
        assert await consumer.fetched(most=2) == (4, 9, [6, 8])
        assert await consumer.fetched() == (9, 10, [9])
        assert await consumer.fetched() is None
        await consumer.request()
        assert await consumer.fetched() == (10, 11, []), "a transaction's marker is an offset without a record"

    run(scenario)


def test_what_a_seek_overtakes_is_told_from_what_follows_it() -> None:
    async def scenario() -> None:
        consumer = Consumer(lambda offset: batch(offset, range(offset, offset + 3)))
        consumer.seek(PARTITION, 20)
        await consumer.request(before_answer=lambda: consumer.seek(PARTITION, 10))
        assert await consumer.fetched() is None, "aiokafka drops an answer from another offset"
        consumer.seek(PARTITION, 20)
        await consumer.request()
        consumer.seek(PARTITION, 10)
        assert await consumer.fetched() is None, "and what it had ready"
        await consumer.request()
        assert await consumer.fetched() == (10, 13, [10, 11, 12])

    run(scenario)


def test_a_fetch_that_waits_while_a_seek_is_made_begins_at_what_was_sought() -> None:
    async def scenario() -> None:
        consumer = Consumer(lambda offset: batch(offset, range(offset, offset + 3)))
        consumer.seek(PARTITION, 20)
        waits = asyncio.create_task(consumer.fetched(timeout=5.0))
        await asyncio.sleep(0)
        await consumer.thread._seek_assigned({PARTITION: 10, TP("interactions", 1): 7})
        await consumer.request()
        assert await waits == (10, 13, [10, 11, 12])

    run(scenario)


def test_waiting_for_records_ends() -> None:
    async def scenario() -> None:
        consumer = Consumer(lambda _: b"")
        consumer.seek(PARTITION, 20)
        assert await consumer.fetched(timeout=0.01) is None
        assert not consumer._fetcher._fetch_waiters

    run(scenario)
