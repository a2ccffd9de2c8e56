"""A deployment for the laws: supervised worker processes, and a seeded stream that is fed to them."""

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Self

import psycopg2

from models.encoder import HashedBagOfWords
from pipeline import registry, topics
from pipeline.artefacts import Artefacts
from pipeline.outbox import Outbox
from pipeline.synthetic import Plan, catalogue, draw_events, item_id
from pipeline.synthetic_messages import Message, messages
from schemas.database import connect_engine
from tests.conftest import Database
from tests.factories import meta_parameters

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
        """The settings as variables, for a process."""
        return {f"INNERLOOP_{name.upper()}": str(value) for name, value in self.values(**more).items()}

    def values(self, **more: object) -> dict[str, Any]:
        return {
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

    def make_topics(self) -> None:
        topics.ensure_topics(self.broker, {TOPIC: {}, "items": topics.COMPACTED, "erasures": {}}, NUM_PARTITIONS)

    def worker(self, name: str = "worker", **settings: Any) -> Worker:
        return Worker(self, name, **settings)

    def publish(self, database: Database | None = None) -> None:
        """Make a version live; random, but its inner step moves the scores visibly."""
        known = [item_id(item) for item in range(NUM_ITEMS - 15)]  # the others are scored from their texts
        parameters = meta_parameters(known, text_dim=ENCODER.size, encoder=ENCODER.name)
        engine = connect_engine((database or self.database).owner_url)
        registry.register(engine, Artefacts(self.home / "artefacts"), parameters, metrics={}, provenance={})
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

    def start(self, words: Sequence[str], environment: Mapping[str, str], out: pathlib.Path, log: pathlib.Path) -> int:
        request = {"words": words, "environment": environment, "out": str(out), "log": str(log)}
        return int(self._ask("start " + json.dumps(request)))

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
    """One process, a worker by default; its two outputs are kept in files of the deployment's home."""

    def __init__(
        self, deployment: Deployment, name: str, *, words: Sequence[str] = ("worker",), **settings: Any
    ) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("INNERLOOP_")}
        self._out, self._log = deployment.home / f"{name}.out", deployment.home / f"{name}.log"
        self._out.touch()
        self._log.touch()
        self._launcher = deployment.launcher
        self._code: int | None = None
        self.process_id = self._launcher.start(words, kept | deployment.settings(**settings), self._out, self._log)

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
            json.loads(line).get("positions", {})
            for line in self._out.read_text().splitlines(keepends=True)
            if "\n" in line
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
    settings: Mapping[str, Any] = field(default_factory=dict)
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
