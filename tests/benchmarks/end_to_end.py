"""(a) Kafka → one worker process → Postgres: how much it sustains, how fresh it is, what it costs, what limits it.

The worker is the real one, `innerloop worker`, on the embedded broker and database; users are drawn by Zipf's law.
Rates are sustained when the worker's position keeps up with what is sent. Freshness is the time from Kafka's timestamp
of an event to the COMMIT of its transaction, as the database noted it, over all events of a run but its first seconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg2

from pipeline import embedded_broker
from tests.benchmarks.feeder import Feeder, Sent
from tests.benchmarks.measuring import cpu_of_tree, cpu_seconds, seconds_in_queue, table
from tests.benchmarks.scene import NUM_ITEMS, NUM_USERS, Deployment, Options

POSITION = "SELECT coalesce(sum(next_offset), 0) FROM innerloop.law WHERE topic = 'interactions'"
FRESHNESS = """SELECT extract(epoch FROM CASE current_setting('track_commit_timestamp')
        WHEN 'on' THEN pg_xact_commit_timestamp(p.xmin) ELSE p.recorded_at END) * 1000 - t.at
    FROM innerloop.prequential p CROSS JOIN LATERAL unnest(p.record_times) AS t (at) WHERE t.at >= %s"""
WORKER = ("-m", "pipeline.cli", "worker")
# Each with the processes that share its partitions.
CONTENDERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "worker": (WORKER,),
    "stock Faust, take(2048)": (("-m", "tests.benchmarks.stock_faust", "take"),),
    "stock Faust, event by event": (("-m", "tests.benchmarks.stock_faust", "events"),),
    "two workers": (WORKER, WORKER),
}
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Plan:
    """How long everything takes."""

    num_users: int = NUM_USERS
    num_items: int = NUM_ITEMS
    backlog: int = 60_000  # drained by every contender
    drain_seconds: float = 20.0  # after which a slow one is stopped
    warm_up: int = 10_000
    run_seconds: float = 15.0
    ladder: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0)  # of the rate at which the backlog was drained
    repeats: int = 1
    below: tuple[float, ...] = (0.25, 0.5, 0.8)  # of the highest sustained rate
    contenders: tuple[str, ...] = tuple(CONTENDERS)


QUICK = Plan(
    num_users=200, num_items=300, backlog=300, drain_seconds=5, warm_up=100, run_seconds=1.0, ladder=(0.1,),
    below=(0.5,),
    contenders=(),
)  # fmt: skip


class Running:
    """A consumer, of one process or several, and what it and the parts beside it have used."""

    def __init__(self, parts: Deployment, name: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("INNERLOOP_")}
        self.home, self.writer_url = parts.home, parts.writer_url
        self.log_file = parts.home / "consumer.log"
        with self.log_file.open("wb") as log:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, *command], stdout=log, stderr=log, env=environment | parts.environment()
                )
                for command in CONTENDERS[name]
            ]
        self._parts = parts
        self._connection = psycopg2.connect(parts.owner_url)
        self._connection.autocommit = True

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall()

    def position(self) -> int:
        ended = any(one.poll() is not None for one in self._processes)
        assert not ended, f"a consumer ended:\n{self.log_file.read_text()[-3000:]}"
        return int(self.query(POSITION)[0][0])

    def wait_for(self, position: int, seconds: float = PATIENCE_SECONDS) -> bool:
        """Whether the position was reached in time."""
        deadline = time.monotonic() + seconds
        while self.position() < position:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far of worker, database and broker; and how long the worker has queued for a core."""
        broker = embedded_broker.daemon(self._parts.home).pid()
        return {
            "worker": sum(cpu_of_tree(one.pid) for one in self._processes),
            "Postgres": cpu_of_tree(self._parts.database_pid),
            "broker": cpu_seconds(broker or 0),
            "queue": sum(seconds_in_queue(one.pid) for one in self._processes),
        }

    def close(self) -> None:
        self._connection.close()
        for one in self._processes:
            one.terminate()
        try:
            for one in self._processes:
                one.wait(15)
        finally:
            for one in self._processes:
                one.kill()


@contextmanager
def running(options: Options, plan: Plan, name: str) -> Iterator[tuple[Running, Feeder]]:
    """A contender over fresh parts, with a feeder."""
    with (
        options.deploy(plan.num_items, True) as parts,
        Feeder(parts.broker, num_users=plan.num_users, num_items=plan.num_items) as feeder,
    ):
        consumer = Running(parts, name)
        try:
            yield consumer, feeder
        finally:
            consumer.close()


@dataclass(frozen=True)
class Window:
    """What happened between two moments."""

    num_events: int
    seconds: float
    cpu: dict[str, float]

    @property
    def rate(self) -> float:
        return self.num_events / self.seconds


def watch(consumer: Running, until: int, seconds: float) -> Window:
    """From now until a position is reached, or for so many seconds."""
    start, position, cpu = time.monotonic(), consumer.position(), consumer.cpu()
    consumer.wait_for(until, seconds)
    after = consumer.cpu()
    taken = time.monotonic() - start
    return Window(consumer.position() - position, taken, {name: after[name] - cpu[name] for name in after})


def drain(plan: Plan, consumer: Running, feeder: Feeder) -> tuple[Window, Sent]:
    """How fast a backlog is worked off, after some events to warm up."""
    feeder.prepare(plan.warm_up)
    feeder.begin(0)
    feeder.finish()
    consumer.wait_for(min(plan.warm_up, 1), PATIENCE_SECONDS)
    consumer.wait_for(plan.warm_up, plan.drain_seconds)
    feeder.prepare(plan.backlog)
    feeder.begin(0)
    sent = feeder.finish()
    return watch(consumer, plan.warm_up + plan.backlog, plan.drain_seconds), sent


@dataclass(frozen=True)
class Rung:
    """One rate, kept for a while."""

    rate: float
    sustained: bool
    kept_up: float
    window: Window
    sent: Sent
    freshness_ms: tuple[float, float]


def climb(plan: Plan, consumer: Running, feeder: Feeder, rate: float) -> Rung:
    """Send at a rate; in the second half the position must move as fast, and half a second may be open at the end."""
    num = int(rate * plan.run_seconds)
    feeder.prepare(num)
    first = consumer.position()
    feeder.begin(rate)
    time.sleep(plan.run_seconds / 2)
    half = watch(consumer, first + num, plan.run_seconds / 2)
    sent = feeder.finish()
    left = first + num - consumer.position()
    kept_up = half.rate / rate
    consumer.wait_for(first + num)
    skipped = min(3.0, plan.run_seconds / 3)
    rows = np.array(consumer.query(FRESHNESS, int((sent.started_at + skipped) * 1000)), float)
    p50, p99 = np.percentile(rows, [50, 99])
    return Rung(rate, kept_up > 0.95 and left < 0.5 * rate, kept_up, half, sent, (float(p50), float(p99)))


def measure_worker(options: Options, plan: Plan) -> list[str]:
    """Tables of the worker: the ladder, and what three rates below the highest cost."""
    with running(options, plan, "worker") as (consumer, feeder):
        drained, sent = drain(plan, consumer, feeder)
        consumer.wait_for(plan.warm_up + plan.backlog)
        rungs = [climb(plan, consumer, feeder, share * drained.rate) for share in plan.ladder]
        best = max((rung.rate for rung in rungs if rung.sustained), default=rungs[0].rate * 0.8)
        lower = [climb(plan, consumer, feeder, share * best) for share in plan.below]
    feeding = [
        f"{sent.num_events / sent.seconds:,.0f} events/s",
        f"{sent.num_events / sent.cpu_seconds:,.0f} events",
        f"{max(rung.sent.latest_ms for rung in rungs):.0f} ms",
    ]
    return [
        f"highest sustained rate: {best:,.0f} events/s (backlog drained at {drained.rate:,.0f})",
        table("ladder", RUNG_COLUMNS, [_rung_row(rung, best) for rung in rungs]),
        table("freshness below it, event → COMMIT", RUNG_COLUMNS, [_rung_row(rung, best) for rung in lower]),
        table("the feeder", ("at most", "per CPU-second", "late at worst on the ladder"), [feeding]),
    ]


RUNG_COLUMNS = (
    "rate", "of highest", "sustained", "kept up", "p50 ms", "p99 ms", "events per CPU-s of worker",
    "cores used: worker", "Postgres", "broker", "queued for one",
)  # fmt: skip


def _rung_row(rung: Rung, best: float) -> list[str]:
    window = rung.window
    return [
        f"{rung.rate:,.0f}",
        f"{rung.rate / best:.0%}",
        "yes" if rung.sustained else "no",
        f"{rung.kept_up:.2f}",
        f"{rung.freshness_ms[0]:.0f}",
        f"{rung.freshness_ms[1]:.0f}",
        f"{window.num_events / max(window.cpu['worker'], 1e-9):,.0f}",
        *(f"{window.cpu[name] / window.seconds:.2f}" for name in ("worker", "Postgres", "broker", "queue")),
    ]


def compare(options: Options, plan: Plan) -> str:
    """All contenders on the same backlog, in turn, several times."""
    windows: dict[str, list[Window]] = {name: [] for name in plan.contenders}
    for _ in range(plan.repeats):
        for name, found in windows.items():
            with running(options, plan, name) as (consumer, feeder):
                found.append(drain(plan, consumer, feeder)[0])
    rates = {name: statistics.median(window.rate for window in found) for name, found in windows.items()}
    rows = []
    for name, found in windows.items():
        per_cpu = statistics.median(window.num_events / max(window.cpu["worker"], 1e-9) for window in found)
        range_of = f"{min(w.rate for w in found):,.0f} … {max(w.rate for w in found):,.0f}"
        queued = statistics.median(window.cpu["queue"] / window.seconds for window in found)
        faster = f"{rates['worker'] / rates[name]:.1f}x"
        rows.append([name, f"{rates[name]:,.0f}", range_of, f"{per_cpu:,.0f}", f"{queued:.2f}", faster])
    columns = ("consumer", "events/s", "range", "events per CPU-s", "queued for a core", "worker is faster by")
    return table(f"a backlog of {plan.backlog:,} events, median of {plan.repeats}", columns, rows)


def main(options: Options) -> None:
    """Print the tables."""
    plan = QUICK if options.quick else Plan(repeats=options.repeats)
    print(f"(a) end to end: {plan.num_items:,} items, {plan.num_users:,} users by Zipf's law", flush=True)
    for text in measure_worker(options, plan):
        print(text, flush=True)
    if plan.contenders:
        print(compare(options, plan), flush=True)
