"""What the consumer hands out belongs to the seek that it follows."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from faust.types import TP

from pipeline.chunks import Fetch
from pipeline.transport import PositionedConsumer
from tests.factories import Record, event, record

PARTITION = TP("interactions", 0)


class Consumer(PositionedConsumer):
    """A consumer without a broker: `log` is what it reads, `interrupted` runs while a fetch is under way."""

    should_stop = False
    flow_active = True
    _buffered_partitions = frozenset[TP]()

    def __init__(self, log: list[Record], position: int) -> None:
        self.log, self.at, self.interrupted = log, 0, False
        self.app = SimpleNamespace(consumer_generation_id=1)
        self.num_seeks, self._seeking = 0, False
        self._handed_out: dict[TP, int] = {}
        self._durable: dict[TP, int] = {}
        self._read_offset: dict[TP, int | None] = {}

        async def positions(assigned: set[TP]) -> dict[TP, int]:
            await self.fetch()  # Faust's generation is the new one already, and the fetcher may still be at work
            return dict.fromkeys(assigned, position)

        self.transport = SimpleNamespace(positions=positions)
        self._thread = SimpleNamespace(seek_wait=self._seek)
        self.fetched: list[Fetch] = []

    def assignment(self) -> set[TP]:
        return {PARTITION}

    async def _seek(self, positions: dict[TP, int]) -> None:
        self.at = positions[PARTITION]

    async def _wait_next_records(self, timeout: float) -> tuple[dict[TP, list[Record]], set[TP]]:
        found = self.log[self.at : self.at + 2]
        self.at += len(found)
        if self.interrupted:
            self.interrupted = False
            await self.perform_seek()
        return {PARTITION: found}, {PARTITION}

    async def fetch(self) -> None:
        async for _, message in self.getmany(0.1):
            self.fetched.append(message.value)

    @property
    def current(self) -> list[int]:
        """Offsets of the records that count."""
        fetches = [one for one in self.fetched if one.num_seeks == self.num_seeks]
        return [one.offset for fetch in fetches for chunk in fetch.chunks for one in chunk.records]


def log() -> list[Record]:
    return [record(event("u", "i", f"e{number}"), number) for number in range(10)]


def run(scenario: Any) -> None:
    asyncio.run(scenario)


def test_what_was_fetched_before_or_during_a_seek_does_not_count() -> None:
    async def scenario() -> None:
        consumer = Consumer(log(), position=1)
        await consumer.fetch()
        await consumer.perform_seek()
        assert [one.num_seeks for one in consumer.fetched] == [0], "what comes during a seek is not handed out at all"
        assert consumer.current == []
        await consumer.fetch()
        assert consumer.current == [1, 2]

    run(scenario())


def test_a_fetch_that_a_seek_overtakes_is_not_handed_out_as_if_it_followed_it() -> None:
    # It would begin behind the position, and what lies between would be counted as skipped.
    async def scenario() -> None:
        consumer = Consumer(log(), position=1)
        await consumer.fetch()
        consumer.interrupted = True
        await consumer.fetch()
        await consumer.fetch()
        assert consumer.current == [1, 2]
        assert consumer.fetched[-1].chunks[0].start == 1

    run(scenario())
