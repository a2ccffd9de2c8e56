"""Whatever partitions and seeks do to fetches on their way: every event reaches the loop once, in its order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from pipeline import worker_intake
from pipeline.batching import micro_batch
from pipeline.chunks import Chunk
from pipeline.settings import Settings
from pipeline.transport import PositionedConsumer
from pipeline.worker_intake import Intake
from schemas.events import parse_interaction
from tests.factories import event, record

TOPIC, END, AT = "interactions", 30, 4  # the log's end, and the position in the database
PARTITION = TP(TOPIC, 0)
LOG = [record(event("u", "i", f"e{number}"), number) for number in range(END)]


class Loop:
    """The loop's positions without a database; a take-over can be held up."""

    def __init__(self) -> None:
        self.positions = {(TOPIC, 0): AT}
        self.applied: list[int] = []
        self.steps: list[str] = []
        self.skipped = 0
        self.num_taken_over = self.num_held = 0
        self.during_take_over: Callable[[], Awaitable[None]] | None = None

    def take_over(self, bounds: Mapping[tuple[str, int], tuple[int, int]]) -> dict[tuple[str, int], int]:
        self.num_taken_over += 1
        self.num_held = len(bounds)
        return dict(self.positions)

    def ready(self, chunks: list[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
        return chunks, []

    def begin(self, chunks: Sequence[Chunk]) -> dict[tuple[str, int], int]:
        durable = dict(self.positions)
        batch = micro_batch(chunks, {0: self.positions[TOPIC, 0]}, parse_interaction)
        self.applied += batch.offset.tolist()
        self.steps.append(f"begin {len(batch.offset)}")
        for advance in batch.advances:
            self.skipped += advance.skipped
            self.positions[TOPIC, 0] = advance.next_offset
        return durable

    def settle(self) -> dict[tuple[str, int], int]:
        self.steps.append("settle")
        return dict(self.positions)


class Consumer(PositionedConsumer):
    """Faust's consumer over LOG, without a broker: it reads five records a fetch from where it is."""

    should_stop = False
    flow_active = True

    def __init__(self, intake: Intake, *, at: int) -> None:
        self.at, self.read_during_seek = at, False
        self.app = SimpleNamespace(consumer_generation_id=1)
        self.transport = SimpleNamespace(positions=intake.positions)
        self._thread = SimpleNamespace(seek_assigned=self._sought)
        self._durable: dict[TP, int] = {}
        self._read_offset: dict[TP, int | None] = {}
        self._buffered_partitions = frozenset[TP]()
        self._seeking = asyncio.Lock()

    def assignment(self) -> set[TP]:
        return {PARTITION}

    async def earliest_offsets(self, *partitions: TP) -> dict[TP, int]:
        return dict.fromkeys(partitions, 0)

    async def highwaters(self, *partitions: TP) -> dict[TP, int]:
        return dict.fromkeys(partitions, END)

    async def _sought(self, positions: Mapping[TP, int]) -> None:
        self.at = positions[PARTITION]
        if self.read_during_seek:
            self.read_during_seek = False
            self.read()
        await asyncio.sleep(0)

    def read(self) -> Chunk:
        start, self.at = self.at, min(self.at + 5, END)
        return Chunk(TOPIC, 0, start, self.at, LOG[start : self.at])

    async def _wait_next_records(self, timeout: float) -> tuple[dict[TP, Chunk], set[TP]]:
        await asyncio.sleep(0)
        return ({PARTITION: self.read()} if self.at < END else {}), {PARTITION}


class Scene:
    """An intake with its loop and consumer; the broker's committed offset is behind the position."""

    def __init__(self, *, at: int = 20) -> None:
        self.loop, self.failures = Loop(), list[Exception]()
        settings = Settings.load(broker="nowhere:1", database_url="postgresql://nowhere", batch_events="10")
        loop: Any = self.loop
        self.intake = Intake(loop, settings, "nowhere:1", in_thread=self._in_thread, fail=self.failures.append)
        self.consumer = Consumer(self.intake, at=at)
        self.intake.app = SimpleNamespace(consumer=self.consumer)

    async def _in_thread(self, step: Callable[[], Any]) -> Any:
        hook, self.loop.during_take_over = self.loop.during_take_over, None
        if hook:
            await hook()
        await asyncio.sleep(0)
        return step()

    async def fetch(self) -> None:
        async for _, message in self.consumer.getmany(0.1):
            await self.intake.inbox.put(message.value)

    async def drain(self) -> None:
        """Fetch and work until everything is in the database."""
        pump = asyncio.create_task(self.intake.pump())
        for _ in range(200):
            await self.fetch()
            await asyncio.sleep(0)
            if pump.done() or self.loop.positions[TOPIC, 0] == END:
                break
        if pump.done():
            pump.result()
        pump.cancel()


@pytest.fixture(autouse=True)
def _no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_intake, "end_offsets", lambda *_: {0: END})


def all_arrive(scene: Scene) -> None:
    assert scene.loop.applied == list(range(AT, END))
    assert scene.loop.skipped == 0
    assert not scene.failures


def test_fetches_during_a_long_take_over_begin_elsewhere_and_do_not_count() -> None:
    # Faust's generation is the new one already, and the fetcher reads on from Kafka's committed offset.
    async def scenario() -> None:
        scene = Scene()
        scene.loop.during_take_over = scene.fetch
        await scene.consumer.perform_seek()
        await scene.drain()
        all_arrive(scene)
        assert scene.loop.num_taken_over == 1

    asyncio.run(scenario())


def test_what_is_read_between_the_seek_and_its_answer_is_read_again() -> None:
    # Dropping it by the time left a gap, whose offsets were counted as skipped.
    async def scenario() -> None:
        scene = Scene()
        scene.consumer.read_during_seek = True
        await scene.consumer.perform_seek()
        await scene.drain()
        all_arrive(scene)
        assert scene.loop.num_taken_over == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("lost", [0, 1, 2, 4])
def test_a_fetch_that_faust_drops_on_its_way_is_read_again(lost: int) -> None:
    async def scenario() -> None:
        scene = Scene()
        await scene.consumer.perform_seek()
        for _ in range(lost):
            await scene.fetch()
        scene.consumer.read()
        await scene.drain()
        all_arrive(scene)

    asyncio.run(scenario())


def test_a_seek_is_finished_although_faust_has_given_up_waiting_for_it() -> None:
    async def scenario() -> None:
        scene = Scene()
        scene.loop.during_take_over = lambda: asyncio.sleep(0.02)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(scene.consumer.perform_seek(), 0.005)
        await asyncio.sleep(0.05)
        await scene.drain()
        all_arrive(scene)

    asyncio.run(scenario())


def test_what_a_take_over_brings_while_partitions_move_again_waits_for_the_next_one() -> None:
    async def scenario() -> None:
        scene = Scene(at=AT)
        scene.loop.during_take_over = scene.intake._revoked
        await scene.consumer.perform_seek()
        pump = asyncio.create_task(scene.intake.pump())
        await scene.fetch()
        await asyncio.sleep(0.01)
        pump.cancel()
        assert scene.loop.applied == [], "the partitions may be another worker's by now"
        await scene.consumer.perform_seek()
        await scene.drain()
        all_arrive(scene)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("waiting", "steps"),
    [
        ([5, 5, 0, 5], ["begin 5", "settle", "begin 10", "settle"]),  # less than batch_events=10
        ([15, 10, 0], ["begin 15", "begin 10", "settle"]),
    ],
)
def test_a_batch_is_begun_before_the_one_in_hand_is_durable_only_where_a_whole_one_waits(
    waiting: list[int], steps: list[str]
) -> None:
    """What has come, by the time that a step begins: while less waits, the commit lets the next batch grow."""
    chunks, start = list[list[Chunk]](), 0
    for num in waiting:
        part = LOG[start : start + num]
        chunks.append([Chunk(TOPIC, 0, start, start + num, part)] if num else [])
        start += num

    async def scenario() -> None:
        scene = Scene()
        scene.loop.positions[TOPIC, 0] = 0

        async def take(*, wait: bool = True) -> list[Chunk]:
            if wait and not chunks:
                await asyncio.sleep(3600)
            return chunks.pop(0) if chunks else []

        scene.intake.inbox.take = take  # type: ignore[method-assign]
        pump = asyncio.create_task(scene.intake.pump())
        await asyncio.sleep(0.05)
        pump.cancel()
        assert scene.loop.steps == steps

    asyncio.run(scenario())


def test_a_worker_that_is_left_without_partitions_holds_none() -> None:
    async def scenario() -> None:
        scene = Scene()
        await scene.consumer.perform_seek()
        assert scene.loop.num_held == 1
        await scene.intake._assigned(None, {PARTITION})
        assert scene.loop.num_held == 1
        await scene.intake._assigned(None, set())
        assert scene.loop.num_held == 0

    asyncio.run(scenario())
