"""A feeder that is not the limit: events are encoded beforehand, put into big batches and sent by aiokafka.

Run as a process: it reads `prepare COUNT` and `send RATE` (events per second, 0 = as fast as the broker takes them)
and answers each with a line of JSON. An event's Kafka timestamp is the moment at which it was due, so that a late
feeder would count against the worker.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice
from typing import Self

from aiokafka import AIOKafkaProducer

from pipeline.synthetic_messages import encoded_chunks
from tests.benchmarks.keys import NUM_PARTITIONS, TOPIC, item_ids, partition_of

TICK_SECONDS = 0.01
MAX_BURST = 2000  # events of one tick at most

Event = tuple[int, bytes, bytes]


@dataclass(frozen=True)
class Sent:
    """One sending: how many events in how many seconds, CPU seconds of the feeder, and how late it was at worst."""

    num_events: int
    seconds: float
    cpu_seconds: float
    latest_ms: float
    started_at: float


class Feeder:
    """The process, as the benchmark sees it."""

    def __init__(self, broker: str, *, num_users: int, num_items: int) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.feeder", broker, str(num_users), str(num_items)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def prepare(self, num_events: int) -> None:
        """Encode the next events."""
        self._tell(f"prepare {num_events}")
        self._answer()

    def begin(self, rate: float) -> None:
        """Start sending what is prepared."""
        self._tell(f"send {rate}")

    def finish(self) -> Sent:
        """Wait until everything is confirmed by the broker."""
        return Sent(**json.loads(self._answer()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the feeder is gone"
        return line


async def _send(producer: AIOKafkaProducer, events: list[Event], rate: float) -> Sent:
    began, cpu, at, latest, confirmations = time.time(), time.process_time(), 0, 0.0, []
    while at < len(events):
        due = len(events) if rate == 0 else min(len(events), int((time.time() - began) * rate))
        due = min(due, at + MAX_BURST)
        if due > at:
            latest = max(latest, time.time() - began - at / rate if rate else 0.0)
            confirmations += await _send_batches(producer, events[at:due], began + at / (rate or 1e9), rate)
            at = due
        await asyncio.sleep(TICK_SECONDS if rate else 0)
    await asyncio.gather(*confirmations)
    return Sent(at, time.time() - began, time.process_time() - cpu, latest * 1000, began)


async def _send_batches(
    producer: AIOKafkaProducer, events: list[Event], first_at: float, rate: float
) -> list[asyncio.Future[object]]:
    now = int(time.time() * 1000)
    batches = [producer.create_batch() for _ in range(NUM_PARTITIONS)]
    for place, (partition, key, value) in enumerate(events):
        at = int((first_at + place / rate) * 1000) if rate else now
        assert batches[partition].append(key=key, value=value, timestamp=at) is not None, "the batch is full"
    return [
        await producer.send_batch(batch, TOPIC, partition=partition)
        for partition, batch in enumerate(batches)
        if batch.record_count()
    ]


async def _serve(broker: str, num_users: int, num_items: int) -> None:
    stream = (
        (partition_of(key), key, value)
        for keys, values in encoded_chunks(10**9, users=num_users, item_ids=item_ids(num_items), chunk=10_000)
        for key, value in zip(keys, values, strict=True)
    )
    producer = AIOKafkaProducer(bootstrap_servers=broker, max_batch_size=1 << 20)
    await producer.start()
    prepared: list[Event] = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, argument = line.split()
        if command == "prepare":
            prepared = list(islice(stream, int(argument)))
            print("prepared", flush=True)
        else:
            print(json.dumps(vars(await _send(producer, prepared, float(argument)))), flush=True)
    await producer.stop()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
