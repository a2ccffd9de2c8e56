"""What a worker reads: Faust's fetches by way of the inbox to the working thread; what is durable back to Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from faust.types import TP

from pipeline.chunks import Chunk, Place, count_records, cut
from pipeline.failpoints import reach
from pipeline.inbox import Inbox
from pipeline.loop import Loop
from pipeline.loop_take_over import TopicRecreated
from pipeline.settings import Settings
from pipeline.topics import end_offsets
from pipeline.transport import stream_app

if TYPE_CHECKING:
    import faust

T = TypeVar("T")
InThread = Callable[[Callable[[], T]], Awaitable[T]]


class Intake:
    """Takes partitions over, and brings their chunks to the loop one batch after the other.

    Args:
        in_thread: runs a step in the one thread that the loop belongs to.
        fail: told of what ends the worker.

    """

    def __init__(
        self,
        loop: Loop,
        settings: Settings,
        broker: str,
        *,
        in_thread: InThread[Any],
        fail: Callable[[Exception], None],
    ) -> None:
        self.loop, self._settings, self._broker = loop, settings, broker
        self._in_thread, self._fail = in_thread, fail
        self.inbox = Inbox(max_records=settings.batch_events)
        # Two fetches may come as one batch, but it must not touch more users than can be held.
        self._most_events = min(2 * settings.batch_events, settings.cache_users)
        self._waiting: list[Chunk] = []  # what is beyond one batch, and interactions that wait for the catalogue
        self._num_revoked = 0
        self.idle = asyncio.Event()  # no batch is in hand or on its way into the database
        self.idle.set()
        self.app = self._make_app()

    def _make_app(self) -> faust.App:
        app = stream_app(
            broker=self._broker,
            group=self._settings.group,
            session_timeout_seconds=self._settings.session_timeout_seconds,
            max_records=self._settings.batch_events,
            positions=self.positions,
        )
        # One agent for both: fetches hold chunks of both, and two agents would not keep them in their order.
        topics = app.topic(
            self._settings.topic_interactions,
            self._settings.topic_items,
            value_serializer="raw",
            key_serializer="raw",
            acks=False,
        )

        async def deliver(stream: Any) -> None:
            async for fetch in stream.noack():
                await self.inbox.put(fetch)

        app.agent(topics, name="deliver", concurrency=1)(deliver)
        app.on_partitions_revoked.connect(self._revoked)
        app.on_partitions_assigned.connect(self._assigned)
        app.finalize()
        return app

    async def positions(self, assigned: set[TP]) -> Mapping[TP, int]:
        """Where the assigned partitions go on: what the consumer is about to seek to, and the inbox to expect."""
        num_revoked = self._num_revoked
        try:
            beginning = await self.app.consumer.earliest_offsets(*assigned)
            end = await self.app.consumer.highwaters(*assigned)
            bounds = {(tp.topic, tp.partition): (beginning[tp], end[tp] or 0) for tp in assigned}
            await self.inbox.close()
            self._waiting = []
            positions = await self._in_thread(partial(self._take_over, bounds))
        except Exception as error:
            self._fail(error)
            raise
        if num_revoked == self._num_revoked:  # else partitions are moving again, and another seek follows
            await self.inbox.reopen(positions)
        ready = {f"{topic}[{partition}]": offset for (topic, partition), offset in sorted(positions.items())}
        print(json.dumps({"event": "ready", "positions": ready}), flush=True)
        return {TP(topic, partition): offset for (topic, partition), offset in positions.items()}

    def _take_over(self, bounds: Mapping[Place, tuple[int, int]]) -> dict[Place, int]:
        # Tansu lists an end that is too low by up to a batch; a fetch tells the true one. Where events are read from
        # matters only when the position lies beyond it, but they wait until the whole catalogue has been read.
        bounds = self._with_true_ends(bounds, self._settings.topic_items)
        try:
            return self.loop.take_over(bounds)
        except TopicRecreated:
            return self.loop.take_over(self._with_true_ends(bounds, self._settings.topic_interactions))

    def _with_true_ends(self, bounds: Mapping[Place, tuple[int, int]], topic: str) -> Mapping[Place, tuple[int, int]]:
        if topic not in {name for name, _ in bounds}:
            return bounds
        ends = end_offsets(self._broker, topic)
        true = {key: (bounds[key][0], ends[key[1]]) for key in bounds if key[0] == topic}
        return {**bounds, **true}

    async def _revoked(self, *_: Any, **__: Any) -> None:
        """Before partitions go to another worker: drop what waits, let the batch in hand commit."""
        self._num_revoked += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.drain(), self._settings.session_timeout_seconds * 0.6)

    async def _assigned(self, _: Any, assigned: set[TP], **__: Any) -> None:
        """Faust seeks nothing where nothing is assigned: what was held is another worker's to change."""
        if not assigned:
            await self._in_thread(partial(self.loop.take_over, {}))

    async def drain(self) -> None:
        """Drop what waits and whatever comes, and wait until what is in hand is durable."""
        await self.inbox.close()
        self._waiting = []
        await self.idle.wait()

    async def pump(self) -> None:
        """Bring what waits into the database and acknowledge it, for ever.

        In a backlog a batch is computed while the one before is being committed. Where less than a batch waits, the
        commit is waited for: what comes meanwhile makes the next batch larger, and an event of a large one costs less.
        """
        while True:
            ready, held = self.loop.ready(self._waiting)
            chunks, later = cut(ready, self._most_events)
            is_backlog = count_records(chunks) >= self._settings.batch_events
            if chunks and (is_backlog or self.idle.is_set()):
                self._waiting = later + held
                self.idle.clear()
                await self._acknowledge(partial(self.loop.begin, chunks))
                continue
            taken = await self.inbox.take(wait=self.idle.is_set())
            if not taken and not self.idle.is_set():
                await self._acknowledge(self.loop.settle)
                self.idle.set()
                taken = await self.inbox.take(wait=False)
            self._waiting = self._waiting + taken  # as it is after the wait, in which a rebalance may have emptied it
            if self.inbox.has_gap:
                await self.app.consumer.perform_seek()

    async def _acknowledge(self, step: Callable[[], dict[Place, int]]) -> None:
        try:
            durable = await self._in_thread(step)
        except BaseException:
            self.idle.set()  # nothing more will come of it
            raise
        if durable:
            reach("before_acknowledge")
            self.app.consumer.acknowledge({TP(topic, partition): at for (topic, partition), at in durable.items()})
