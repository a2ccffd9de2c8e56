"""Starting and stopping: SIGTERM drains, what is missing yet is waited for, what is wrong ends with 78 and a remedy."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from kafka import KafkaProducer

from pipeline.heartbeat import pulses
from tests.brokers import Tansu, free_ports
from tests.conftest import Database, Postgres
from tests.laws.harness import (
    CONFIGURATION,
    OK,
    ROOT,
    Deploy,
    Deployment,
    Feeder,
    Launcher,
    fill_catalogue,
    lag,
    position,
    query,
    send,
    stream,
    wait_until,
)
from tests.laws.judgement import assert_as_twin, assert_law


def test_sigterm_under_load_drains_and_the_next_worker_goes_on(broker: Tansu, deploy: Deploy, twin: Database) -> None:
    deployment, sent = deploy(broker.address), stream(2500)
    with Feeder(broker.address, sent, rate=400) as feeder:
        for name in ("first", "second"):
            with deployment.worker(name) as worker:
                before = position(deployment.database)
                wait_until(lambda before=before: position(deployment.database) > before + 300, worker)  # type: ignore[misc]  # typed lambdas have no defaults
                stopped_at = time.monotonic()
                worker.signal(signal.SIGTERM)
                assert worker.wait() == OK, worker.log
                assert time.monotonic() - stopped_at < 10  # the contract of whatever stops containers
        feeder.finish()
    with deployment.worker("third") as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
    assert_as_twin(deployment, assert_law(deployment, sent), twin)


def test_the_first_event_waits_for_the_last_item(broker: Tansu, deploy: Deploy) -> None:
    # one batch of items, of which several fetches are made: Tansu lists its first offset plus one as the end
    deployment = deploy(broker.address)
    producer = KafkaProducer(bootstrap_servers=broker.address, linger_ms=2000, batch_size=2**20, max_request_size=2**22)
    for number in range(2000):
        name = f"late-{number}"
        item = json.dumps({"v": 1, "item_id": name, "text": name})
        producer.send("items", key=name.encode(), value=item.encode(), partition=0)
    producer.close()
    send(broker.address, stream(300))
    with deployment.worker(batch_events=100) as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
        assert [(pulse.process_id, pulse.stale) for pulse in pulses(deployment.home)] == [(worker.process_id, False)]
    reader = deployment.database.owner_url
    offsets = query(reader, "SELECT DISTINCT from_offset FROM innerloop.activations WHERE kind = 'catalogue'")
    assert offsets == [(0,)], "events came between two parts of the catalogue"
    assert query(reader, "SELECT count(*) FROM innerloop.items WHERE item_id LIKE %s", "late-%") == [(2000,)]


def test_a_worker_that_has_caught_up_can_be_restarted(broker: Tansu, deploy: Deploy) -> None:
    # Tansu lists an end that is too low when the last batch held several records: no reason to think the topic new
    deployment, sent = deploy(broker.address), stream(300)
    send(broker.address, sent)
    with deployment.worker("first") as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
    with deployment.worker("second") as worker:
        worker.wait_until_ready()
    assert_law(deployment, sent)


@contextmanager
def forwarded(port: int, address: str) -> Iterator[None]:
    """A port that leads to the broker while this lasts; the broker itself then names its own address."""
    host, target = address.rsplit(":", 1)

    def copy(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65_536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, socket.create_connection((host, int(target))) as server:
                back = threading.Thread(target=copy, args=(server, client))
                back.start()
                copy(client, server)
                back.join()

    with closing(socket.create_server(("127.0.0.1", port))) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_worker_started_before_its_broker_waits_and_then_works(broker: Tansu, deploy: Deploy) -> None:
    deployment, sent = deploy(broker.address), stream(200)
    send(broker.address, sent)
    (port,) = free_ports(1)
    with deployment.worker(broker=f"127.0.0.1:{port}") as worker:
        worker.wait_until_says("no Kafka broker answers")
        assert worker.num_assignments == 0
        with forwarded(port, broker.address):
            wait_until(lambda: lag(deployment) == 0, worker)
            worker.signal(signal.SIGTERM)
            assert worker.wait() == OK, worker.log
    assert worker.log.count('"waiting"') == 1
    assert_law(deployment, sent)


def test_without_a_live_version_a_worker_is_not_ready_and_says_what_makes_one(
    broker: Tansu, database: Database, launcher: Launcher, tmp_path: pathlib.Path
) -> None:
    deployment, sent = Deployment(broker.address, database, tmp_path, launcher), stream(200)
    deployment.make_topics()
    fill_catalogue(database)
    send(broker.address, sent)
    with deployment.worker() as worker:
        worker.wait_until_says("innerloop meta-train")
        assert (worker.num_assignments, position(database)) == (0, 0)
        deployment.publish()
        wait_until(lambda: lag(deployment) == 0, worker)
    assert_law(deployment, sent)


def test_a_worker_that_waits_for_a_version_can_be_stopped(
    broker: Tansu, database: Database, launcher: Launcher, tmp_path: pathlib.Path
) -> None:
    deployment = Deployment(broker.address, database, tmp_path, launcher)
    deployment.make_topics()
    with deployment.worker() as worker:
        worker.wait_until_says("innerloop meta-train")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == OK, worker.log


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"topic_interactions": "nowhere"}, "innerloop migrate"),
        ({"partitions": 7}, "INNERLOOP_PARTITIONS"),
        ({"database_url": "reader"}, "innerloop_writer"),
        ({"database_url": "owner"}, "innerloop_writer"),
        ({"database_url": "no schema"}, "innerloop migrate"),
        ({"encoder": "hashed:128"}, "INNERLOOP_ENCODER"),
    ],
    ids=["topic missing", "other partitions", "reader's login", "owner's login", "schema missing", "other encoder"],
)
def test_a_wrong_configuration_ends_with_78_and_its_remedy(
    settings: dict[str, object], words: str, services: Postgres, broker: Tansu, deploy: Deploy, database: Database
) -> None:
    urls = {
        "reader": database.reader_url,
        "owner": database.owner_url,
        "no schema": services.url("writer", "postgres"),
    }
    if "database_url" in settings:
        settings = {"database_url": urls[str(settings["database_url"])]}
    with deploy(broker.address).worker("worker", **settings) as worker:
        assert worker.wait() == CONFIGURATION, worker.log
        assert words in worker.log
        assert worker.num_assignments == 0


def test_the_command_itself_ends_with_78_when_the_topics_are_missing(
    broker: Tansu, database: Database, launcher: Launcher, tmp_path: pathlib.Path
) -> None:
    deployment = Deployment(broker.address, database, tmp_path, launcher)
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "worker"],
        env=dict(os.environ) | deployment.settings(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == CONFIGURATION, ended.stderr
    assert "innerloop migrate" in ended.stderr
    assert "Traceback" not in ended.stderr
