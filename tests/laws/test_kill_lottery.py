"""Two workers killed -9 at random moments: the law stays exact, and rows are those of a run that nothing disturbed."""

from __future__ import annotations

import random

import pytest

from tests.brokers import ApacheKafka, Tansu
from tests.conftest import Database
from tests.laws.harness import FENCED, Deploy, Deployment, Feeder, Fleet, send, stream
from tests.laws.judgement import assert_as_twin, assert_law, contents, replay

SESSION_SECONDS = 6  # the least that Apache Kafka accepts


def lottery(
    deployment: Deployment,
    twin: Database,
    *,
    kills: str,
    num_events: int,
    rate: float,
    kafka: ApacheKafka | None = None,
) -> None:
    """Feed while killing (W: a worker, B: the broker); then everything must be as if nothing had happened."""
    sent, draw = stream(num_events), random.Random(len(kills))
    with Fleet(deployment) as fleet, Feeder(deployment.broker, sent, rate=rate) as feeder:
        for kill in kills:
            fleet.tend_for(draw.uniform(0.0, 3.0))
            if kafka and kill == "B":
                kafka.restart()
            else:
                fleet.kill(draw)
        feeder.finish()
        fleet.wait_until_caught_up()
    for worker in fleet.ended:
        # A broker that goes between our check and Faust's own start ends the worker; its next life waits.
        assert worker.code == FENCED or (kafka and "Unable to bootstrap" in worker.log), worker.log
    log = assert_law(deployment, sent)
    assert_as_twin(deployment, log, twin)


def test_five_kills_of_two_workers_leave_the_law_exact(broker: Tansu, deploy: Deploy, twin: Database) -> None:
    lottery(deploy(broker.address), twin, kills="WWWWW", num_events=4000, rate=200)


@pytest.mark.kafka
def test_kills_of_workers_and_of_apache_kafka_leave_the_law_exact(
    kafka: ApacheKafka, deploy: Deploy, twin: Database
) -> None:
    deployment = deploy(kafka.address, session_timeout_seconds=SESSION_SECONDS)
    lottery(deployment, twin, kills="WBW", num_events=3000, rate=100, kafka=kafka)


@pytest.mark.long
def test_twenty_kills_of_two_workers_leave_the_law_exact(broker: Tansu, deploy: Deploy, twin: Database) -> None:
    lottery(deploy(broker.address), twin, kills="W" * 20, num_events=50_000, rate=600)


@pytest.mark.long
@pytest.mark.kafka
def test_twenty_kills_of_workers_and_two_of_apache_kafka_leave_the_law_exact(
    kafka: ApacheKafka, deploy: Deploy, twin: Database
) -> None:
    deployment = deploy(kafka.address, session_timeout_seconds=SESSION_SECONDS)
    kills = "WWWWWWWBWWWWWWWBWWWWWW"
    lottery(deployment, twin, kills=kills, num_events=50_000, rate=300, kafka=kafka)


def test_a_replay_of_the_whole_topic_changes_no_row(broker: Tansu, deploy: Deploy) -> None:
    deployment, sent = deploy(broker.address), stream(1000)
    send(broker.address, sent)
    with Fleet(deployment, size=1) as fleet:
        fleet.wait_until_caught_up()
    before = contents(deployment.database)
    log = assert_law(deployment, sent)
    replay(deployment, log, deployment.database)
    with deployment.worker(group="another-that-kafka-sends-back-to-the-beginning") as worker:
        worker.wait_until_ready()
        assert sum(worker.positions[0][f"interactions[{partition}]"] for partition in range(4)) == len(sent)
    assert contents(deployment.database) == before
