"""Real events, one by one through Kafka, worker and Postgres, give the lists that the judged file was made with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
import pytest
from kafka import KafkaProducer

from pipeline import registry
from pipeline.artefacts import Artefacts
from pipeline.topics import ensure_topics
from schemas.database import connect_engine
from tests.benchmarks.stream import Stream, StreamWorker, load_stream, train
from tests.brokers import Tansu
from tests.conftest import Database

PATIENCE_SECONDS = 60.0


@contextmanager
def worker(broker: str, database: Database, home: Path) -> Iterator[None]:
    """A worker process over one partition, ready when the block begins."""
    variables = {
        "INNERLOOP_BROKER": broker,
        "INNERLOOP_DATABASE_URL": database.writer_url,
        "INNERLOOP_HOME": str(home),
        "INNERLOOP_ENCODER": "hashed",
        "INNERLOOP_PARTITIONS": "1",
        "INNERLOOP_SESSION_TIMEOUT_SECONDS": "2",
    }
    command = [sys.executable, "-m", "pipeline.cli", "worker"]
    with open(home / "worker.log", "wb") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert b'"ready"' in line, (home / "worker.log").read_text()
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0, (home / "worker.log").read_text()
            process.stdout.close()


def feed_catalogue(broker: str, stream: Stream) -> None:
    """The films in the topic of items, as a deployment has them: the worker takes its partition over without any."""
    with closing(KafkaProducer(bootstrap_servers=broker, enable_idempotence=False)) as producer:
        for film in stream.data.films:
            value = {"v": 1, "item_id": film.item_id, "text": film.text}
            producer.send("items", key=film.item_id.encode(), value=json.dumps(value).encode())


class Through:
    """Sends one event and reads the user's list once it is committed."""

    def __init__(self, broker: str, database: Database) -> None:
        self._producer = KafkaProducer(bootstrap_servers=broker, linger_ms=0, enable_idempotence=False)
        self._connection = psycopg2.connect(database.reader_url)
        self._connection.autocommit = True

    def send(self, event: dict[str, object], place: int) -> list[str]:
        """The ten best for the event's user after it."""
        key = str(event["user_id"]).encode()
        self._producer.send("interactions", key=key, value=json.dumps(event).encode()).get(PATIENCE_SECONDS)
        limit = time.monotonic() + PATIENCE_SECONDS
        with self._connection.cursor() as cursor:
            while time.monotonic() < limit:
                cursor.execute("SELECT next_offset FROM innerloop.law WHERE topic = 'interactions'")
                if cursor.fetchall() == [(place + 1,)]:
                    cursor.execute("SELECT item_id FROM innerloop.recommend(%s, 10) ORDER BY rank", (event["user_id"],))
                    return [row[0] for row in cursor.fetchall()]
                time.sleep(0.002)
        raise AssertionError(f"event {place} was not applied within {PATIENCE_SECONDS} s")

    def close(self) -> None:
        """Let both connections go."""
        self._producer.close()
        self._connection.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("num_events", [120, pytest.param(2000, marks=pytest.mark.long)])
def test_events_one_by_one_give_the_lists_of_the_judged_file(
    num_events: int, broker: Tansu, database: Database, home: Path
) -> None:
    stream = load_stream(home, "tune")
    parameters = train(stream, home, seed=0, encoder="hashed")
    engine = connect_engine(database.owner_url)
    registry.register(engine, Artefacts(home / "artefacts"), parameters, metrics={}, provenance={})
    engine.dispose()
    ensure_topics(broker.address, {"interactions": {}, "items": {}, "erasures": {}}, 1)
    feed_catalogue(broker.address, stream)
    offline = StreamWorker(stream, parameters, home, encoder="hashed")
    events = list(stream.data.events(stream.events[:num_events]))
    with worker(broker.address, database, home):
        through = Through(broker.address, database)
        for place, event in enumerate(events):
            expected = offline.listed(offline.apply_places([place]), 10)[event["user_id"]]
            assert through.send(event, place) == expected, f"event {place}"
        through.close()
