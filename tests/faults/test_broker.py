"""A broker that is away, that refuses, or whose group never comes to rest."""

from __future__ import annotations

import signal
import time

import pytest

from tests.brokers import ApacheKafka, Tansu
from tests.conftest import Database
from tests.laws.harness import OK, Deploy, Deployment, Feeder, lag, position, send, stream, wait_until
from tests.laws.judgement import assert_as_twin, assert_law
from tests.laws.test_kill_lottery import SESSION_SECONDS


def away(deployment: Deployment, kafka: ApacheKafka, *, seconds: float) -> None:
    """A broker killed under a worker that has work in hand; the same worker goes on when it is back."""
    first, rest = stream(1500)[:700], stream(1500)[700:]
    send(kafka.address, first)
    with deployment.worker() as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
        kafka.kill9()
        time.sleep(seconds)
        assert worker.code is None, worker.log
        assert worker.log.count("\n") < 100 + 10 * seconds, "it must not fill its log"
        kafka.start()
        with Feeder(kafka.address, rest, rate=1e9) as feeder:
            feeder.finish()
        wait_until(lambda: lag(deployment) == 0, worker)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == OK, worker.log
    assert_law(deployment, [*first, *rest])


@pytest.mark.kafka
@pytest.mark.parametrize("seconds", [8, pytest.param(60, marks=pytest.mark.long)])
def test_a_broker_that_is_away_for_a_while_is_waited_for_by_the_same_worker(
    seconds: int, kafka: ApacheKafka, deploy: Deploy
) -> None:
    away(deploy(kafka.address, session_timeout_seconds=SESSION_SECONDS), kafka, seconds=seconds)


@pytest.mark.kafka
def test_a_worker_without_the_right_to_read_is_not_ready_and_asks_once_a_second_at_most(
    kafka: ApacheKafka, deploy: Deploy
) -> None:
    deployment, sent = deploy(kafka.address, session_timeout_seconds=SESSION_SECONDS), stream(600)
    send(kafka.address, sent[:300])
    kafka.revoke("interactions")
    with deployment.worker("early") as worker:
        worker.wait_until_says("TopicAuthorizationFailed")
        time.sleep(5)
        assert (worker.code, worker.num_assignments) == (None, 0)
        assert worker.log.count("TopicAuthorizationFailed") == 1, "said once"
        kafka.grant("interactions")
        wait_until(lambda: position(deployment.database) == 300, worker)
        kafka.revoke("interactions")  # and once more, under a worker that works
        wait_until(lambda: worker.code is not None or "uthoriz" in worker.log.split("in use")[-1])
        time.sleep(5)
        assert worker.log.count("\n") < 300, "it must not fill its log"
    with deployment.worker("late") as worker:
        worker.wait_until_says("TopicAuthorizationFailed")
        assert worker.num_assignments == 0
        kafka.grant("interactions")
        send(kafka.address, sent[300:])
        wait_until(lambda: lag(deployment) == 0, worker)
    assert_law(deployment, sent)


def test_a_rebalance_storm_makes_progress_and_leaves_the_law_exact(
    broker: Tansu, deploy: Deploy, twin: Database
) -> None:
    deployment, sent = deploy(broker.address), stream(2500)
    with deployment.worker("steady") as steady, Feeder(broker.address, sent, rate=150) as feeder:
        steady.wait_until_ready()
        for number in range(3):  # somebody comes and goes all the time
            before = position(deployment.database)
            with deployment.worker(f"passing-{number}") as passing:
                passing.wait_until_ready()
                passing.signal(signal.SIGTERM)
                assert passing.wait() == OK, passing.log
            if number < 2:  # later ones may find nothing left to do
                assert position(deployment.database) > before, steady.log
        assert steady.num_assignments >= 4
        feeder.finish()
        wait_until(lambda: lag(deployment) == 0, steady)
    assert_as_twin(deployment, assert_law(deployment, sent), twin)
