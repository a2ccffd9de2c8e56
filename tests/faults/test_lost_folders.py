"""Folders that a worker fills by itself may go at any time: it makes them again."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import closing

from kafka import KafkaProducer

from pipeline.heartbeat import pulses
from tests.brokers import Tansu
from tests.conftest import Database
from tests.laws.harness import OK, Deploy, lag, query, send, stream, wait_until
from tests.laws.judgement import assert_law

KNOWN = "SELECT count(*) FROM innerloop.items WHERE item_id LIKE 'new-%%' AND known"


def add_items(broker: str, prefix: str) -> None:
    with closing(KafkaProducer(bootstrap_servers=broker, enable_idempotence=False)) as producer:
        for number in range(20):
            name = f"new-{prefix}-{number}"
            value = json.dumps({"v": 1, "item_id": name, "text": f"a thing called {name}"})
            producer.send("items", key=name.encode(), value=value.encode())


def test_cache_and_heartbeat_that_are_deleted_under_a_worker_or_between_two_are_made_again(
    broker: Tansu, deploy: Deploy, database: Database
) -> None:
    deployment, sent = deploy(broker.address), stream(600)
    cache, workers = deployment.home / "cache", deployment.home / "workers"
    send(broker.address, sent[:200])
    with deployment.worker("first") as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
        before = {path.relative_to(cache) for path in cache.rglob("*")}
        assert before, "there is nothing to lose"
        shutil.rmtree(cache)
        shutil.rmtree(workers)
        add_items(broker.address, "one")
        send(broker.address, sent[200:400])
        wait_until(lambda: lag(deployment) == 0 and query(database.owner_url, KNOWN) == [(20,)], worker)
        wait_until(lambda: len(pulses(deployment.home)) == 1, worker)
        wait_until(cache.exists, worker)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == OK, worker.log
    shutil.rmtree(cache)
    shutil.rmtree(workers)
    send(broker.address, sent[400:])
    with deployment.worker("second") as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
        assert {path.relative_to(cache) for path in cache.rglob("*")} >= before
    assert_law(deployment, sent)
