"""Faust fed by the chunk: one Faust message per fetch, sought to the database's position, committed behind it.

Stock Faust spends about 150 µs on every message, so a worker would stop at some 6,000 events a second. Here one Faust
message carries everything that a fetch brought, partition by partition; agents, rebalancing and generation checks stay
Faust's own. Three of its methods are replaced, and nothing is patched at import:

* `getmany` hands out `Fetch` objects;
* `perform_seek` starts every assigned partition at the position that Postgres holds, not at Kafka's committed offset;
* the committable offsets are the positions that have been committed to Postgres (`acknowledge`), so Kafka's committed
  offset is what it should be: a hint for lag tools, never ahead of the truth.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import faust
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from pipeline.chunks import Chunk, Fetch, Record

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


class PositionedConsumer(driver.Consumer):  # type: ignore[misc]  # untyped base
    """Faust's consumer, reading from the positions in Postgres, one message per fetch."""

    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handed_out: dict[TP, int] = {}
        self._durable: dict[TP, int] = {}

    async def perform_seek(self) -> None:
        """Start each assigned partition at the position of the database. Called by Faust on every assignment."""
        assigned = {TP(tp.topic, tp.partition) for tp in self.assignment()}
        if not assigned:
            return
        positions = dict(await self.transport.positions(assigned))
        # In the consumer's own thread: touching aiokafka from the app's thread raises KeyError in its fetcher.
        await self._thread.seek_wait(positions)
        for tp, offset in positions.items():
            self._read_offset[tp] = offset or None
            self._handed_out[tp] = offset
            self._durable.pop(tp, None)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        """Give one message with everything that a fetch brought; called by Faust's fetcher for ever."""
        records, active = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if records is None or self.should_stop:
            return
        if not self.flow_active:
            return  # a rebalance: these records are dropped, and Faust seeks before it lets the flow resume
        wanted = {
            tp: rows
            for tp, rows in records.items()
            if rows and (active is None or tp in active or tp in self._buffered_partitions)
        }
        chunks = [self._chunk(tp, rows) for tp, rows in wanted.items()]
        if chunks and self.flow_active and self.app.consumer_generation_id == generation:
            tp = next(iter(wanted))
            yield tp, self._as_message(tp, Fetch(generation, chunks))

    def _chunk(self, tp: TP, records: Sequence[Record]) -> Chunk:
        start = self._handed_out.get(tp, records[0].offset)
        next_offset = self._handed_out[tp] = records[-1].offset + 1
        return Chunk(tp.topic, tp.partition, start, next_offset, records)

    def _as_message(self, tp: TP, fetch: Fetch) -> ConsumerMessage:
        last = fetch.chunks[0].records[-1]
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            last.offset,
            last.timestamp / 1000.0,
            0,
            [],
            None,
            fetch,
            None,
            0,
            0,
            tp,
            generation_id=fetch.generation,
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
        broker: `host:port,…`.
        group: consumer group.
        session_timeout_seconds: after which the broker gives a silent worker's partitions away.
        max_records: most records of one fetch.
        positions: asked on every assignment for the offset at which each partition goes on.

    """
    app = faust.App(
        group,
        broker=[f"aiokafka://{address.strip()}" for address in broker.split(",")],
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
