"""A deployment for the laws: supervised worker processes, a seeded stream, and what must have become of it.

What must be in the database is computed twice from the log as it lies in the broker: the fates in plain Python, and
users, scores and predictions by one undisturbed loop over a database of its own (the twin).
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import psycopg2
import torch

from models.encoder import HashedBagOfWords
from pipeline import registry, topics
from pipeline.chunks import Chunk
from pipeline.outbox import Outbox
from pipeline.settings import Settings
from pipeline.store import SESSION
from pipeline.synthetic import Plan, catalogue, draw_events, item_id
from pipeline.synthetic_messages import Message, messages
from pipeline.worker import build_loop
from schemas.database import connect_engine
from tests.conftest import Database
from tests.factories import Record, meta_parameters

ROOT = pathlib.Path(__file__).parents[2]
ENCODER = HashedBagOfWords(64)
NUM_ITEMS, NUM_PARTITIONS, TOPIC = 60, 4, "interactions"
TYPES = (("click", 0.7), ("purchase", 0.1), ("rating", 0.05), ("dismiss", 0.1), ("impression", 0.05))
MAX_ENDED = 30
OK, FAILED, FENCED, CONFIGURATION = 0, 1, 3, 78
PATIENCE_SECONDS = 240.0  # only ends tests that would never end: two cores may be shared with much else


@dataclass(frozen=True)
class Deployment:
    """A broker with its topics, a database with a live version and a catalogue, and the settings that name them."""

    broker: str
    database: Database
    home: pathlib.Path
    launcher: Launcher
    session_timeout_seconds: int = 2  # as Tansu allows; Apache Kafka refuses less than 6

    def settings(self, **more: object) -> dict[str, str]:
        values = {
            "broker": self.broker,
            "database_url": self.database.writer_url,
            "home": self.home,
            "encoder": f"hashed:{ENCODER.size}",
            "session_timeout_seconds": self.session_timeout_seconds,
            "batch_events": 256,  # small, so that there are many transactions to be killed in
            "cache_users": 1000,
            "partitions": NUM_PARTITIONS,
            **more,
        }
        return {f"INNERLOOP_{name.upper()}": str(value) for name, value in values.items()}

    def make_topics(self) -> None:
        topics.ensure_topics(self.broker, {TOPIC: {}, "items": topics.COMPACTED, "erasures": {}}, NUM_PARTITIONS)

    def worker(self, name: str = "worker", **settings: object) -> Worker:
        return Worker(self, name, **settings)

    def publish(self, database: Database | None = None) -> None:
        """Make a version live; random, but its inner step moves the scores visibly."""
        known = [item_id(item) for item in range(NUM_ITEMS - 15)]  # the others are scored from their texts
        parameters = meta_parameters(known, text_dim=ENCODER.size, encoder=ENCODER.name)
        engine = connect_engine((database or self.database).owner_url)
        registry.register(engine, self.home, parameters, metrics={}, provenance={})
        engine.dispose()


Deploy = Callable[..., Deployment]


def fill_catalogue(database: Database) -> None:
    """The items as one snapshot, so that every database numbers them alike and has one activation."""
    rows = [(item["item_id"], item["text"]) for item in catalogue(Plan(items=NUM_ITEMS))]
    with closing(psycopg2.connect(database.owner_url)) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO innerloop.catalogue_snapshots DEFAULT VALUES")
        cursor.executemany("INSERT INTO innerloop.items (item_id, text, snapshot) VALUES (%s, %s, 1)", rows)
        connection.commit()


def query(url: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(statement, values)
        return cursor.fetchall()


def stream(num_events: int, *, users: int = 200, seed: int = 1) -> list[Message]:
    """Events with 5 % duplicates and 1 % malformed messages."""
    drawn = draw_events(Plan(users=users, items=NUM_ITEMS, choices=num_events, types=TYPES, repeats=0.2, seed=seed))
    return list(messages(drawn, duplicates=0.05, malformed=0.01, seed=seed))


class Feeder(threading.Thread):
    """Sends messages at a rate, each confirmed by the broker; `finish` waits for the last and says what failed."""

    def __init__(self, broker: str, stream: Sequence[Message], *, rate: float) -> None:
        super().__init__(daemon=True)
        self._broker, self._stream, self._rate = broker, stream, rate
        self._unfinished: object = "the feeder hangs or crashed"
        self._stopped = threading.Event()

    def run(self) -> None:
        start = time.monotonic()
        with Outbox(self._broker, TOPIC) as outbox:
            for number, message in enumerate(self._stream):
                if number % 20 == 0 and self._stopped.wait(max(0.0, start + number / self._rate - time.monotonic())):
                    return
                outbox.send(number, message.key, message.value)
        self._unfinished = outbox.failures

    def finish(self) -> None:
        self.join(PATIENCE_SECONDS)
        assert self._unfinished == {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def send(broker: str, stream: Sequence[Message]) -> None:
    """Send messages as fast as the broker takes them."""
    with Feeder(broker, stream, rate=1e9) as feeder:
        feeder.finish()


def memory_kib(process_id: int) -> int:
    """Resident memory of a process."""
    status = pathlib.Path(f"/proc/{process_id}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


class Launcher:
    """Starts workers; see `launcher.py`. They are its children, so it is asked how they ended."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.laws.launcher"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def start(self, environment: Mapping[str, str], out: pathlib.Path, log: pathlib.Path) -> int:
        return int(self._ask("start " + json.dumps({"environment": environment, "out": str(out), "log": str(log)})))

    def poll(self, process_id: int) -> int | None:
        answer = self._ask(f"poll {process_id}")
        return int(answer) if answer else None

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the launcher is gone"
        return answer.strip()


class Worker:
    """One worker process; its two outputs are kept in files of the deployment's home."""

    def __init__(self, deployment: Deployment, name: str, **settings: object) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("INNERLOOP_")}
        self._out, self._log = deployment.home / f"{name}.out", deployment.home / f"{name}.log"
        self._out.touch()
        self._log.touch()
        self._launcher = deployment.launcher
        self._code: int | None = None
        self.process_id = self._launcher.start(kept | deployment.settings(**settings), self._out, self._log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def num_assignments(self) -> int:
        """How often it said that it is ready: once for every assignment of partitions."""
        return len(self.positions)

    @property
    def positions(self) -> list[dict[str, int]]:
        return [
            json.loads(line)["positions"] for line in self._out.read_text().splitlines(keepends=True) if "\n" in line
        ]

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._launcher.poll(self.process_id)
        return self._code

    def signal(self, number: signal.Signals) -> None:
        if self.code is None:
            os.kill(self.process_id, number)

    def wait(self) -> int:
        wait_until(lambda: self.code is not None)
        assert self.code is not None
        return self.code

    def wait_until_ready(self) -> Self:
        wait_until(lambda: self.num_assignments > 0, self)
        return self

    def wait_until_says(self, words: str) -> Self:
        wait_until(lambda: words in self.log, self)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self.wait()


def wait_until(condition: Callable[[], bool], worker: Worker | None = None) -> None:
    """Wait, as long as the worker lives."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        ended = worker.code if worker else None
        assert ended is None or condition(), f"ended with {ended}:\n{worker and worker.log[-3000:]}"
        assert time.monotonic() < deadline, f"never happened:\n{worker and worker.log[-3000:]}"
        time.sleep(0.1)


@dataclass
class Fleet:
    """Workers under a supervisor that starts another whenever one has ended.

    `ended` are those that were not killed.
    """

    deployment: Deployment
    size: int = 2
    settings: Mapping[str, object] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    ended: list[Worker] = field(default_factory=list)
    num_started: int = 0

    def __enter__(self) -> Self:
        self.workers = [self._start() for _ in range(self.size)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.__exit__()

    def _start(self) -> Worker:
        self.num_started += 1
        return Worker(self.deployment, f"worker-{self.num_started}", **self.settings)

    def tend(self) -> None:
        """Replace the workers that have ended."""
        for place, worker in enumerate(self.workers):
            if worker.code is not None:
                self.ended.append(worker)
                self.workers[place] = self._start()

    def kill(self, draw: random.Random) -> None:
        """kill -9 of one of the workers that hold partitions, at any moment from then on, and start another."""
        self.wait_until(lambda: any(worker.num_assignments for worker in self.workers))
        self.tend_for(draw.uniform(0.0, 2.0))
        place = draw.choice([place for place, worker in enumerate(self.workers) if worker.num_assignments] or [0])
        self.workers[place].__exit__()
        self.workers[place] = self._start()

    def tend_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.tend()
            time.sleep(0.05)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            logs = "\n--\n".join(worker.log[-2000:] for worker in [*self.ended[-2:], *self.workers])
            assert time.monotonic() < deadline, f"never happened; logs:\n{logs}"
            assert len(self.ended) < MAX_ENDED, f"they end by themselves; logs:\n{logs}"
            self.tend_for(0.2)

    def wait_until_caught_up(self) -> None:
        self.wait_until(lambda: lag(self.deployment) == 0)


def lag(deployment: Deployment) -> int:
    """Broker end offsets minus positions."""
    rows = query(deployment.database.reader_url, "SELECT sum(next_offset) FROM innerloop.law WHERE topic = %s", TOPIC)
    return sum(topics.end_offsets(deployment.broker, TOPIC).values()) - int(rows[0][0] or 0)


def position(database: Database) -> int:
    """Offsets that the database has passed, over all partitions."""
    rows = query(database.reader_url, "SELECT sum(next_offset) FROM innerloop.law WHERE topic = %s", TOPIC)
    return int(rows[0][0] or 0)


LAW = """SELECT partition, first_offset, next_offset, applied, dead_lettered, duplicates, dropped, skipped, broken
    FROM innerloop.law WHERE topic = 'interactions' ORDER BY partition"""
DEAD = 'SELECT partition, "offset", reason FROM innerloop.dead_letters WHERE topic = %s ORDER BY 1, 2'


def assert_law(deployment: Deployment, sent: Iterable[Message]) -> list[topics.Record]:
    """Counters, dead letters and positions are those that plain reasoning over the broker's log gives; returns it."""
    sent = list(sent)
    log = list(topics.read_topic(deployment.broker, TOPIC))
    assert Counter(record.value for record in log) == Counter(message.value for message in sent), "the feeder is wrong"
    malformed = {message.value: message.fate for message in sent if message.fate not in {"applied", "duplicate"}}
    counts, dead = _fates(log, malformed)
    ends = topics.end_offsets(deployment.broker, TOPIC)
    expected = [
        (partition, 0, ends[partition], tally["applied"], tally["dead"], tally["duplicate"], 0, 0, False)
        for partition, tally in sorted(counts.items())
    ]
    assert query(deployment.database.reader_url, LAW) == expected
    assert query(deployment.database.owner_url, DEAD, TOPIC) == dead
    return log


def _fates(
    log: Sequence[topics.Record], malformed: Mapping[bytes, str]
) -> tuple[dict[int, Counter[str]], list[tuple[int, int, str]]]:
    counts: dict[int, Counter[str]] = {partition: Counter() for partition in range(NUM_PARTITIONS)}
    dead, known = [], defaultdict[str, set[str]](set)
    for record in sorted(log, key=lambda record: (record.partition, record.offset)):
        value = record.value or b""
        if value in malformed:
            counts[record.partition]["dead"] += 1
            dead.append((record.partition, record.offset, malformed[value]))
            continue
        body = json.loads(value)
        repeated = body["event_id"] in known[body["user_id"]]
        counts[record.partition]["duplicate" if repeated else "applied"] += 1
        known[body["user_id"]].add(body["event_id"])
    return counts, dead


USERS = """SELECT user_id, partition, last_offset, num_events, num_applied, support_items, support_types,
    adapter_events, meta_version, top_items, recent_ids, recent_seen, num_seen, adapter, top_scores
    FROM innerloop.user_state ORDER BY user_id"""
PREDICTIONS = """SELECT partition, "offset", user_id, item_id, type, num_events, rank_adapted, rank_start, rank_popular,
    loss_adapted, loss_start FROM innerloop.prequential_events ORDER BY 1, 2"""
POPULAR = "SELECT partition, item_nos, scores FROM innerloop.popular_items ORDER BY 1"
ACTIVATIONS = "SELECT partition, kind, value, from_offset FROM innerloop.activations ORDER BY 1, 2, 4"


def assert_as_twin(deployment: Deployment, log: Sequence[topics.Record], twin: Database) -> None:
    """One loop that nothing disturbs, over the same log in another cut, leaves the same rows in a fresh database."""
    deployment.publish(twin)
    fill_catalogue(twin)
    replay(deployment, log, twin)
    mine, other = deployment.database.owner_url, twin.owner_url
    for statement, num_floats in ((LAW, 0), (ACTIVATIONS, 0), (USERS, 2), (PREDICTIONS, 2), (POPULAR, 1)):
        _assert_equal(query(mine, statement), query(other, statement), num_floats)
    assert query(mine, DEAD, TOPIC) == query(other, DEAD, TOPIC)


def _assert_equal(mine: list[tuple[Any, ...]], other: list[tuple[Any, ...]], num_floats: int) -> None:
    """The last `num_floats` columns to 1e-6, the others exactly."""
    assert len(mine) == len(other)
    for row, wanted in zip(mine, other, strict=True):
        split = len(row) - num_floats
        assert row[:split] == wanted[:split]
        for got, value in zip(row[split:], wanted[split:], strict=True):
            np.testing.assert_allclose(np.array(got, float), np.array(value, float), rtol=1e-6, atol=1e-6)


def replay(deployment: Deployment, log: Sequence[topics.Record], database: Database) -> None:
    """Put the whole log through a loop in this process."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as the worker does
    engine = connect_engine(database.writer_url, options=SESSION)
    names = {name.removeprefix("INNERLOOP_").lower(): value for name, value in deployment.settings().items()}
    loop = build_loop(Settings.load(**names), engine)
    loop.wait_for_version()
    ends = {(TOPIC, partition): (0, 10**9) for partition in range(NUM_PARTITIONS)}
    loop.take_over(ends)
    for partition in range(NUM_PARTITIONS):
        for chunk in _chunks([record for record in log if record.partition == partition]):
            loop.advance([chunk])
    loop.store.close()
    engine.dispose()


def _chunks(log: Sequence[topics.Record], size: int = 777) -> Iterator[Chunk]:
    for start in range(0, len(log), size):
        rows = [
            Record(TOPIC, record.partition, record.offset, record.timestamp_ms, record.key, record.value)
            for record in log[start : start + size]
        ]
        yield Chunk(TOPIC, rows[0].partition, rows[0].offset, rows[-1].offset + 1, rows)


TABLES = ("user_state", "event_ids", "seen_items", "prequential", "dead_letters", "item_statistics", "activations")
POSITIONS = """SELECT topic, partition, first_offset, next_offset, applied, dead_lettered, duplicates, dropped, skipped
    FROM innerloop.stream_position ORDER BY 1, 2"""


def contents(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that was derived from the stream, to the last bit and timestamp."""
    everything = "SELECT t::text FROM innerloop.{} t ORDER BY 1"
    rows = {name: query(database.owner_url, everything.format(name)) for name in TABLES}
    return rows | {"stream_position": query(database.owner_url, POSITIONS)}
