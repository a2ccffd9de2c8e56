"""(d) `recommend(user, 10)` over SQL while a worker's write path runs at a steady rate, 100,000 users stored."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing

import numpy as np
import psycopg2
from numpy.typing import NDArray

from pipeline.chunks import Chunk
from pipeline.loop import Loop
from pipeline.synthetic import draw, user_id, zipf
from tests.benchmarks.measuring import table
from tests.benchmarks.scene import (
    NUM_ITEMS,
    NUM_USERS,
    TOP_N,
    Deployment,
    Options,
    batches,
    make_loop,
    one_thread,
    parameters,
)

RATE = 1500.0  # events per second of the write path meanwhile
RECOMMEND = "SELECT item_id, score, rank, source FROM innerloop.recommend(%s, %s)"


class Writer(threading.Thread):
    """A worker's loop at a steady rate, in batches of `size`, until it is stopped."""

    def __init__(self, loop: Loop, work: list[list[Chunk]], *, rate: float) -> None:
        super().__init__()
        self._loop, self._work, self._rate = loop, work, rate
        self._stopped = threading.Event()
        self.num_events, self.seconds, self.failure = 0, 0.0, ""

    def run(self) -> None:
        start = time.monotonic()
        for chunks in self._work:
            if self._stopped.wait(max(0.0, start + self.num_events / self._rate - time.monotonic())):
                break
            self._loop.advance(chunks)
            self.num_events += sum(len(chunk.records) for chunk in chunks)
        else:
            self.failure = "the writer ran out of events"
        self.seconds = time.monotonic() - start

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def read(parts: Deployment, *, num_calls: int, num_users: int, k: int) -> NDArray[np.float64]:
    """Milliseconds of each call, users drawn by Zipf's law, one connection."""
    rng = np.random.default_rng(3)
    users = draw(np.cumsum(zipf(num_users, 1.0)), rng, num_calls).tolist()
    taken = np.zeros(num_calls)
    with closing(psycopg2.connect(parts.reader_url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        for call, user in enumerate(users):
            start = time.perf_counter()
            cursor.execute(RECOMMEND, (user_id(user), k))
            rows = cursor.fetchall()
            taken[call] = (time.perf_counter() - start) * 1000
            assert len(rows) == k
    return taken


def measure(
    parts: Deployment, executor: Executor, *, num_users: int, num_items: int, num_calls: int, rate: float, size: int
) -> list[list[str]]:
    """Rows of the table: recommend() beside an idle writer and beside a busy one."""
    loop = make_loop(parts.writer_url, parameters(num_items))
    ends = [0, 0, 0, 0]
    for chunks in batches(num_users, size=2048, users=num_users, num_items=num_items, activity=None, ends=ends):
        loop.advance(chunks)
    work = list(batches(num_users, size=size, users=num_users, num_items=num_items, ends=ends))
    with executor as reader:

        def reading(k: int) -> NDArray[np.float64]:
            return reader.submit(read, parts, num_calls=num_calls, num_users=num_users, k=k).result()

        reading(10)
        rows = [_row("nothing is written", "10", reading(10))]
        writer = Writer(loop, work, rate=rate)
        writer.start()
        time.sleep(min(1.0, num_calls / 1000))
        under_load = {k: reading(k) for k in (10, TOP_N)}
        writer.stop()
    assert not writer.failure, writer.failure
    loop.store.close()
    written = f"{writer.num_events / writer.seconds:,.0f} events/s written"
    return rows + [_row(written, str(k), taken) for k, taken in under_load.items()]


def _row(beside: str, k: str, taken: NDArray[np.float64]) -> list[str]:
    p50, p99, worst = np.percentile(taken, [50, 99, 100])
    return [beside, k, f"{len(taken):,}", f"{p50:.2f}", f"{p99:.2f}", f"{worst:.1f}"]


def main(options: Options) -> None:
    """Print the table."""
    one_thread()
    num_items, num_users = (300, 500) if options.quick else (NUM_ITEMS, NUM_USERS)
    # in a process of its own, as readers are: the writer's interpreter must not be waited for
    spawn = multiprocessing.get_context("spawn")
    executor = ThreadPoolExecutor(1) if options.quick else ProcessPoolExecutor(1, spawn)
    with options.deploy(num_items, False) as parts:
        rows = measure(
            parts,
            executor,
            num_users=num_users,
            num_items=num_items,
            num_calls=100 if options.quick else 4000,
            rate=400 if options.quick else RATE,
            size=40 if options.quick else 128,
        )
    columns = ("beside", "k", "calls", "p50 ms", "p99 ms", "worst ms")
    print(table(f"(d) recommend(user, k), {num_users:,} users stored, one reader in its own process", columns, rows))
