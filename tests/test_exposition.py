"""Metrics: they say what the rows, the broker and the monitor say, and that the database is away when it is."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from pipeline import topics
from pipeline.exposition import StreamCollector, text_of
from pipeline.outbox import Outbox
from schemas.database import connect_engine
from tests.brokers import Tansu
from tests.conftest import Database

TOPIC = "interactions"
ROWS = f"""
    INSERT INTO innerloop.stream_position (topic, partition, first_offset, next_offset, applied, dead_lettered,
        duplicates, dropped, rate_limited, updated_at)
    VALUES ('{TOPIC}', 0, 2, 12, 4, 3, 1, 2, 1, now() - interval '90 seconds');
    INSERT INTO innerloop.dead_letters (topic, partition, "offset", reason, detail, payload, sha256)
    VALUES ('{TOPIC}', 0, 5, 'BAD_JSON', 'why', 'x', repeat('0', 64));
"""  # noqa: S608 - names of this file


def samples(exposed: str) -> dict[str, float]:
    """Every sample by its name and labels, as in `name{fate=applied,partition=0}`."""
    found = {}
    for family in text_string_to_metric_families(exposed):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@pytest.fixture
def stream(broker: Tansu) -> str:
    topics.ensure_topics(broker.address, {TOPIC: {}}, 2)
    return broker.address


def test_metrics_say_what_rows_and_broker_say(database: Database, stream: str) -> None:
    with closing(Outbox(stream, TOPIC)) as outbox:
        for number in range(20):
            outbox.send(number, b"u", b"{}", number % 2)
    engine = connect_engine(database.writer_url)
    with engine.begin() as connection:
        connection.execute(text(ROWS))
    found = samples(text_of(StreamCollector(connect_engine(database.reader_url), stream, TOPIC)))
    assert found["innerloop_up"] == 1
    expected = {"applied": 4, "dead_lettered": 3, "duplicates": 1, "dropped": 2, "skipped": 0}
    assert {fate: found[f"innerloop_events_total{{fate={fate},partition=0}}"] for fate in expected} == expected
    assert found["innerloop_events_rate_limited_total{partition=0}"] == 1
    assert (found["innerloop_position{partition=0}"], found["innerloop_law_broken{partition=0}"]) == (12, 0)
    assert 90 <= found["innerloop_position_age_seconds{partition=0}"] < 300
    assert found["innerloop_lag"] == 20 - 12, "the partition that nobody has taken counts as well"
    assert found["innerloop_partition_lag{partition=0}"] == topics.end_offsets(stream, TOPIC)[0] - 12
    assert found["innerloop_dead_letters_open"] == 1
    assert (found["innerloop_monitor_alive"], found["innerloop_users"]) == (0, 0)
    assert not {"innerloop_live_version", "innerloop_freshness_seconds{quantile=0.5}"} & found.keys()


def test_without_a_broker_the_law_is_told_and_the_lag_is_not(database: Database) -> None:
    with connect_engine(database.writer_url).begin() as connection:
        connection.execute(text(ROWS))
    found = samples(text_of(StreamCollector(connect_engine(database.reader_url), None, TOPIC)))
    assert found["innerloop_law_broken{partition=0}"] == 0
    assert not {"innerloop_lag", "innerloop_partition_lag{partition=0}"} & found.keys()


def test_while_the_database_is_away_that_is_all_that_is_told() -> None:
    away = connect_engine("postgresql://reader@127.0.0.1:1/innerloop")
    assert samples(text_of(StreamCollector(away, None, TOPIC))) == {"innerloop_up": 0}


@contextmanager
def command(database: Database, port: int) -> Iterator[subprocess.Popen[str]]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("INNERLOOP_")}
    # A broker must be named beside the database; this one is away.
    named = {"INNERLOOP_DATABASE_URL": database.reader_url, "INNERLOOP_BROKER": "127.0.0.1:1"}
    words = [sys.executable, "-m", "pipeline.cli", "metrics", "--port", str(port)]
    with subprocess.Popen(words, env={**inherited, **named}, stdout=-1, stderr=-1, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_command_serves_until_it_is_told_to_end(database: Database) -> None:
    with command(database, 0) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with urllib.request.urlopen(address) as answer:  # noqa: S310 - our own server
            found = samples(answer.read().decode())
        assert found["innerloop_up"] == 1
        assert "innerloop_lag" not in found
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_port_that_is_taken_is_named_with_the_option_that_changes_it(database: Database) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with command(database, port) as process:
            _, said = process.communicate(timeout=60)
    assert process.returncode == 78
    assert f"127.0.0.1:{port}" in said
    assert "--port" in said
