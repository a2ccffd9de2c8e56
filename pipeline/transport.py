"""Faust fed by the chunk: one Faust message per fetch, sought to the database's position, committed behind it.

Stock Faust spends about 150 µs on every message, so a worker would stop at some 6,000 events a second. Here one Faust
message carries everything that a fetch brought, partition by partition; agents and rebalancing stay Faust's own. Four
of its methods are replaced, and nothing is patched at import:

* the consumer thread's `_fetch_records` tells of every partition which offset was asked for and up to where was read;
* `getmany` hands out `Fetch` objects;
* `perform_seek` starts every assigned partition at the position that Postgres holds, not at Kafka's committed offset;
* the committable offsets are the positions that have been committed to Postgres (`acknowledge`), so Kafka's committed
  offset is what it should be: a hint for lag tools, never ahead of the truth.

Faust drops fetches whenever partitions move, and one may begin before a seek and end after it. Nothing here tries to
tell by the time: whoever takes the chunks looks at their offsets, and calls `perform_seek` when one is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

import faust
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from pipeline.broker import Broker
from pipeline.chunks import Chunk, Fetch

# Faust asks for 1,500; a broker that answers an idle long poll late (Tansu) would add as much to every event.
FETCH_MAX_WAIT_MS = 50
# A broker that has just come back may name no partitions yet. The group's leader then assigns none, until it looks
# again: after five minutes by default.
METADATA_MAX_AGE_MS = 3000


Positions = Callable[[set[TP]], Awaitable[Mapping[TP, int]]]


class _ConsumerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]  # untyped base
    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_MAX_WAIT_MS
        return consumer

    async def _fetch_records(
        self, consumer: Any, active_partitions: set[TP], timeout: float | None = None, max_records: int | None = None
    ) -> dict[TP, Chunk]:
        """What has been read of each partition; waits up to `timeout` seconds for something."""
        found = await self._fetched(consumer, active_partitions, max_records)
        if timeout and not found and self.consumer.flow_active:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(consumer._fetcher._create_fetch_waiter(), timeout)
            found = await self._fetched(consumer, active_partitions, max_records)
        return found

    async def _fetched(self, consumer: Any, active_partitions: set[TP], max_records: int | None) -> dict[TP, Chunk]:
        """What is there, from the positions that were asked for to those that are asked for next."""
        subscriptions = consumer._fetcher._subscriptions
        while self.consumer.flow_active and subscriptions.reassignment_in_progress:
            await subscriptions.wait_for_assignment()
        if not self.consumer.flow_active:
            return {}
        assignment = subscriptions.subscription.assignment
        states = {tp: assignment.state_value(tp) for tp in assignment.tps}
        asked = {TP(*tp): state.position for tp, state in states.items() if state.has_valid_position}
        # Without a timeout aiokafka does not wait: nobody seeks between here and there, and what it hands out begins at
        # the position.
        records = await super()._fetch_records(consumer, active_partitions, timeout=0, max_records=max_records)
        return {
            tp: Chunk(tp.topic, tp.partition, start, states[tp].position, records.get(tp, ()))
            for tp, start in asked.items()
            if states[tp].position > start
        }

    async def seek_assigned(self, positions: Mapping[TP, int]) -> None:
        """Seek those partitions that are still assigned; the others have moved on meanwhile."""
        # In this thread: touching aiokafka from the app's thread raises KeyError in its fetcher.
        await self.call_thread(self._seek_assigned, positions)

    async def _seek_assigned(self, positions: Mapping[TP, int]) -> None:
        consumer = self._ensure_consumer()
        for tp in positions.keys() & consumer.assignment():
            consumer.seek(tp, positions[tp])


class PositionedConsumer(driver.Consumer):  # type: ignore[misc]  # untyped base
    """Faust's consumer, reading from the positions in Postgres, one message per fetch."""

    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._durable: dict[TP, int] = {}
        self._seeking = asyncio.Lock()

    async def perform_seek(self) -> None:
        """Start each assigned partition at the position of the database.

        Called by Faust on every assignment, and by whoever finds that a fetch is missing.
        """
        # Faust gives up waiting after 90 seconds, or when partitions move again, and then lets the flow resume.
        await asyncio.shield(asyncio.ensure_future(self._seek_to_positions()))

    async def _seek_to_positions(self) -> None:
        async with self._seeking:
            assigned = {TP(tp.topic, tp.partition) for tp in self.assignment()}
            if not assigned:
                return
            positions = dict(await self.transport.positions(assigned))
            await self._thread.seek_assigned(positions)
            for tp, offset in positions.items():
                self._read_offset[tp] = offset or None
                self._durable.pop(tp, None)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        """Give one message with everything that a fetch brought; called by Faust's fetcher for ever."""
        chunks, active = await self._wait_next_records(timeout)
        if not chunks or self.should_stop or not self.flow_active:
            return
        wanted = {
            tp: chunk
            for tp, chunk in chunks.items()
            if active is None or tp in active or tp in self._buffered_partitions
        }
        if wanted:
            tp = next(iter(wanted))
            yield tp, self._as_message(tp, Fetch(list(wanted.values())))

    def _as_message(self, tp: TP, fetch: Fetch) -> ConsumerMessage:
        timestamp = max((chunk.records[-1].timestamp for chunk in fetch.chunks if chunk.records), default=0) / 1000.0
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            fetch.chunks[0].next_offset - 1,
            timestamp,
            0,
            [],
            None,
            fetch,
            None,
            0,
            0,
            tp,
            generation_id=self.app.consumer_generation_id,
        )

    def acknowledge(self, positions: Mapping[TP, int]) -> None:
        """Say that everything below these offsets is in Postgres; Faust's commit timer tells Kafka."""
        self._durable.update(positions)

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterable[TP]:
        return [tp for tp in self._durable if topics is None or tp in topics or tp.topic in topics]

    def _filter_committable_offsets(self, tps: Iterable[TP]) -> dict[TP, int]:
        return {tp: self._durable.pop(tp) for tp in list(tps) if tp in self._durable}


class PositionedTransport(driver.Transport):  # type: ignore[misc]  # untyped base
    """Faust's aiokafka transport with `PositionedConsumer` in it."""

    Consumer = PositionedConsumer

    def __init__(self, app: faust.App, positions: Positions) -> None:
        super().__init__(app.conf.broker_consumer, app)
        self.positions = positions


def stream_app(
    *, broker: str, group: str, session_timeout_seconds: float, max_records: int, positions: Positions
) -> faust.App:
    """The Faust app of a worker.

    Args:
        broker: `host:port,…`, or a URL as `pipeline.broker` reads it.
        group: consumer group.
        session_timeout_seconds: after which the broker gives a silent worker's partitions away.
        max_records: most records of one fetch.
        positions: asked on every assignment for the offset at which each partition goes on.

    """
    address = Broker.parse(broker)
    app = faust.App(
        group,
        broker=[f"aiokafka://{server}" for server in address.servers],
        broker_credentials=_credentials(address),
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        broker_session_timeout=session_timeout_seconds,
        broker_heartbeat_interval=min(0.5, session_timeout_seconds / 4),
        broker_commit_interval=1.0,
        broker_max_poll_records=max_records,
        consumer_metadata_max_age_ms=METADATA_MAX_AGE_MS,
        stream_buffer_maxsize=2,
        stream_wait_empty=False,
        autodiscover=False,
    )
    app.transport = PositionedTransport(app, positions)
    return app


def _credentials(broker: Broker) -> faust.types.CredentialsT | None:
    if broker.username is None:
        return faust.SSLCredentials(broker.context) if broker.context else None
    return faust.SASLCredentials(
        username=broker.username, password=broker.password, mechanism=broker.mechanism, ssl_context=broker.context
    )
