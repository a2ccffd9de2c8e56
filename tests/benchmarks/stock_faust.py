"""The peer of (a): the same decoding, inner loop and transaction behind Faust as it comes out of the box.

Run as a process with the worker's settings and one of two ways in which Faust applications are written:

* `take`: an agent over `stream.take_events(batch_events, within=0.05)`, one transaction per batch taken;
* `events`: an agent over `stream.events()`, one transaction per event.

Only the transport differs from the worker: one Faust message per record, Kafka's committed offsets, stock settings.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faust

from pipeline.chunks import Chunk
from pipeline.logs import quieten_logs
from pipeline.loop import Loop
from pipeline.session import SESSION
from pipeline.settings import Settings
from pipeline.worker import build_loop
from schemas.database import connect_engine
from tests.benchmarks.scene import one_thread
from tests.factories import Record

WITHIN_SECONDS = 0.05


def stock_app(settings: Settings, loop: Loop, way: str) -> faust.App:
    """A Faust application whose only agent brings events into the loop."""
    broker = f"aiokafka://{settings.broker}"
    app = faust.App(settings.group, broker=broker, store="memory://", web_enabled=False, topic_disable_leader=True)
    topic = app.topic(settings.topic_interactions, key_serializer="raw", value_serializer="raw")
    thread = ThreadPoolExecutor(1)

    async def advance(events: Sequence[Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(thread, loop.advance, _chunks(events))

    async def take(stream: Any) -> None:
        async for events in stream.take_events(settings.batch_events, within=WITHIN_SECONDS):
            await advance(events)

    async def one_by_one(stream: Any) -> None:
        async for event in stream.events():
            await advance([event])

    app.agent(topic, name="adapt")(take if way == "take" else one_by_one)
    return app


def _chunks(events: Sequence[Any]) -> list[Chunk]:
    """The events as the worker sees its fetches: consecutive records, by partition."""
    rows: dict[int, list[Record]] = {}
    for event in events:
        message = event.message
        record = Record(
            message.topic, message.partition, message.offset, int(message.timestamp * 1000), message.key, message.value
        )
        rows.setdefault(message.partition, []).append(record)
    return [Chunk(part[0].topic, number, part[0].offset, part[-1].offset + 1, part) for number, part in rows.items()]


async def _run(way: str) -> None:
    settings = Settings.load()
    engine = connect_engine(settings.connection("writer")[1], options=SESSION)
    loop = build_loop(settings, engine)
    loop.wait_for_version()
    loop.take_over({(settings.topic_interactions, number): (0, 10**9) for number in range(settings.partitions)})
    app = stock_app(settings, loop, way)
    app.finalize()
    await app.start()
    while not app.crashed:
        await asyncio.sleep(0.2)
    raise RuntimeError("Faust crashed") from app.crash_reason


if __name__ == "__main__":
    quieten_logs()
    one_thread()
    asyncio.run(_run(sys.argv[1]))
