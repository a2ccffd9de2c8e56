"""The parts that the demo runs: its events, a worker process, and what it reads from the database meanwhile."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from sqlalchemy import Engine, text

from pipeline.datasets import MovieLens100K
from pipeline.demo_figures import Score, choose_user
from pipeline.lines import Line

READY_SECONDS, STOP_SECONDS, END_SECONDS = 120.0, 15.0, 300.0
# Of a user's own deployment only these matter to a demo; the rest must not lead it to real brokers or databases.
KEPT_VARIABLES = ("INNERLOOP_HOME", "INNERLOOP_ENCODER", "INNERLOOP_DEVICE", "INNERLOOP_TORCH_THREADS")
NEWCOMER_EVENTS = 5

_NEW_ROWS = text(
    """
    SELECT p.partition, p.next_offset, extract(epoch FROM p.recorded_at) * 1000 AS recorded_ms, p.record_times,
        p.user_ids, p.rank_adapted, p.rank_start, p.rank_popular, p.loss_adapted, p.loss_start
    FROM innerloop.prequential p
    JOIN unnest(CAST(:partitions AS int[]), CAST(:offsets AS bigint[])) AS seen (partition, next_offset)
        ON p.partition = seen.partition AND p.first_offset >= seen.next_offset
    WHERE p.topic = :topic ORDER BY p.partition, p.first_offset
    """
)
_APPLIED = text("SELECT coalesce(sum(next_offset), 0) FROM innerloop.stream_position WHERE topic = :topic")
# All partitions have the newest catalogue in use, and it knows all items.
_PREPARED = text(
    """
    SELECT (SELECT count(*) FROM innerloop.items WHERE known) = :items
        AND count(DISTINCT a.partition) = :partitions
    FROM innerloop.activations a WHERE a.topic = :topic AND a.kind = 'catalogue'
        AND a.value = (SELECT max(snapshot) FROM innerloop.catalogue_snapshots)
    """
)


class DemoFailed(Exception):
    """A part of the demo ended or did not answer; the message holds the end of its log."""


@dataclass(frozen=True)
class Play:
    """What is trained on, what is streamed, who is the newcomer that is held back, and what the films are called."""

    fit: list[dict[str, Any]]
    stream: list[dict[str, Any]]
    unseen: frozenset[str]
    newcomer: list[dict[str, Any]]
    titles: dict[str, str]

    @classmethod
    def of(cls, data: MovieLens100K, seed: int) -> Play:
        """Cut the data at the moment when the user at 80 % comes for the first time."""
        fit, stream = (list(data.events(data.rows(part))) for part in ("fit", "stream"))
        unseen = frozenset({event["user_id"] for event in stream} - {event["user_id"] for event in fit})
        chosen = choose_user(stream, unseen, seed)
        own = [event for event in stream if event["user_id"] == chosen]
        others = [event for event in stream if event["user_id"] != chosen]
        titles = {film.item_id: film.title + (f" ({film.year})" if film.year else "") for film in data.films}
        return cls(fit, others, unseen - {chosen}, own, titles)


def lines(events: Iterable[dict[str, Any]]) -> Iterator[Line]:
    """Number the events as lines of a file."""
    for number, event in enumerate(events, 1):
        yield Line(number, msgspec.json.encode(event))


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(msgspec.json.encode(record) for record in records) + b"\n")
    return path


class Process:
    """`innerloop worker` (or monitor, or trainer) as a process of its own, as it is deployed."""

    def __init__(self, words: Sequence[str], variables: dict[str, str], log: Path) -> None:
        self._name = words[0]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("INNERLOOP_")}
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(  # noqa: S603 - our own commands
                [sys.executable, "-m", "pipeline.cli", *words],
                env={**inherited, **kept, **variables},
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            if line.startswith(b"{"):
                self._said.put(json.loads(line))

    def wait_ready(self) -> None:
        """Return when it says that it works; raises DemoFailed."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            self.check()
            try:
                if self._said.get(timeout=0.2).get("event") == "ready":
                    return
            except queue.Empty:
                continue
        raise DemoFailed(f"the {self._name} was not ready within {READY_SECONDS:.0f} s: {self._end_of_log()}")

    def check(self) -> None:
        """Raise DemoFailed when it has ended."""
        code = self._process.poll()
        if code is not None:
            raise DemoFailed(f"the {self._name} ended with exit code {code}: {self._end_of_log()}")

    def wait_ended(self) -> None:
        """Return when it has ended by itself with 0; raises DemoFailed."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the {self._name} did not end within {END_SECONDS:.0f} s: {self._end_of_log()}") from None
        if code != 0:
            raise DemoFailed(f"the {self._name} ended with exit code {code}: {self._end_of_log()}")

    def stop(self) -> int:
        """Ask it to finish, and give its exit code; one that does not end in time is killed."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _end_of_log(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class Watch:
    """Follows the prequential rows and the positions of one topic."""

    def __init__(self, engine: Engine, topic: str, partitions: int, scores: list[Score]) -> None:
        self._engine, self._topic, self._scores = engine, topic, scores
        self._partitions = partitions
        self._seen = dict.fromkeys(range(partitions), 0)
        self._recent: deque[tuple[float, list[float]]] = deque()
        self._applied: deque[tuple[float, int]] = deque()
        self.latencies: list[float] = []

    def prepared(self, num_items: int) -> bool:
        """Return whether every partition has the whole catalogue in use."""
        values = {"items": num_items, "partitions": self._partitions, "topic": self._topic}
        with self._engine.connect() as connection:
            return bool(connection.execute(_PREPARED, values).scalar_one())

    def applied(self) -> int:
        """Return how many offsets are behind the positions, all partitions together."""
        with self._engine.connect() as connection:
            return int(connection.execute(_APPLIED, {"topic": self._topic}).scalar_one())

    def update(self) -> tuple[int, float]:
        """Read what is new; returns (offsets passed, offsets a second over the last seconds)."""
        values = {"topic": self._topic, "partitions": list(self._seen), "offsets": list(self._seen.values())}
        now = time.monotonic()
        with self._engine.connect() as connection:
            rows = connection.execute(_NEW_ROWS, values).all()
            applied = int(connection.execute(_APPLIED, {"topic": self._topic}).scalar_one())
        for row in rows:
            self._seen[row.partition] = row.next_offset
            waited = [float(row.recorded_ms) - at for at in row.record_times]
            self.latencies += waited
            self._recent.append((now, waited))
            ranks = {"adapted": row.rank_adapted, "start": row.rank_start, "popular": row.rank_popular}
            for score in self._scores:
                score.add(row.user_ids, ranks, {"adapted": row.loss_adapted, "start": row.loss_start})
        while self._recent and self._recent[0][0] < now - 10:
            self._recent.popleft()
        self._applied.append((now, applied))
        while self._applied[0][0] < now - 5:
            self._applied.popleft()
        (then, before), span = self._applied[0], now - self._applied[0][0]
        return applied, (applied - before) / span if span and then else 0.0

    def freshness(self) -> tuple[float, float] | tuple[None, None]:
        """Return p50 and p99 of the last ten seconds' events, in ms."""
        waited = [one for _, some in self._recent for one in some]
        return quantiles(waited) if waited else (None, None)


def quantiles(waited: list[float]) -> tuple[float, float]:
    """Return p50 and p99."""
    p50, p99 = np.percentile(waited, [50, 99])
    return float(p50), float(p99)
