"""PostgreSQL stopped under load: nothing is lost, nothing becomes a dead letter, and the worker resumes by itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.brokers import Tansu
from tests.conftest import Database, Postgres
from tests.laws.harness import OK, Deploy, Deployment, Feeder, lag, position, send, stream, wait_until
from tests.laws.judgement import assert_as_twin, assert_law


@contextmanager
def away(services: Postgres) -> Iterator[None]:
    services.stop()
    try:
        yield
    finally:
        services.start()


def outage(deployment: Deployment, services: Postgres, twin: Database, *, seconds: float, num_events: int) -> None:
    sent = stream(num_events)
    with deployment.worker() as worker, Feeder(deployment.broker, sent, rate=200) as feeder:
        wait_until(lambda: position(deployment.database) > 200, worker)
        before = position(deployment.database)
        with away(services):
            time.sleep(seconds)
        assert position(deployment.database) < before + 500, "the outage must have held the worker up"
        feeder.finish()
        wait_until(lambda: lag(deployment) == 0, worker)
        assert worker.code is None
        assert "the database is away" in worker.log
    assert_as_twin(deployment, assert_law(deployment, sent), twin)


def test_the_database_away_for_ten_seconds_costs_nothing(
    services: Postgres, broker: Tansu, deploy: Deploy, twin: Database
) -> None:
    outage(deploy(broker.address), services, twin, seconds=10, num_events=3500)


@pytest.mark.long
def test_the_database_away_for_thirty_seconds_costs_nothing(
    services: Postgres, broker: Tansu, deploy: Deploy, twin: Database
) -> None:
    outage(deploy(broker.address), services, twin, seconds=30, num_events=20_000)


def test_a_worker_can_be_stopped_while_the_database_is_away(services: Postgres, broker: Tansu, deploy: Deploy) -> None:
    deployment, sent = deploy(broker.address), stream(600)
    with deployment.worker("stopped") as worker, Feeder(broker.address, sent, rate=200) as feeder:
        wait_until(lambda: position(deployment.database) > 100, worker)
        with away(services):
            worker.wait_until_says("the database is away")
            worker.signal(signal.SIGTERM)
            assert worker.wait() == OK, worker.log
        feeder.finish()
    with deployment.worker("next") as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
    assert_law(deployment, sent)


def test_a_worker_started_before_its_database_waits_for_it(services: Postgres, broker: Tansu, deploy: Deploy) -> None:
    deployment, sent = deploy(broker.address), stream(100)
    send(broker.address, sent)
    with ExitStack() as stack:
        with away(services):
            worker = stack.enter_context(deployment.worker())
            worker.wait_until_says('"waiting"')
        wait_until(lambda: lag(deployment) == 0, worker)
    assert_law(deployment, sent)
