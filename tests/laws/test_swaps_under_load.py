"""Versions changed again and again while events pour in: the law, and which version every prediction was made under."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from pipeline import promotion, registry, versions
from pipeline.artefacts import Artefacts
from pipeline.promotion import Watched
from pipeline.synthetic import item_id
from pipeline.versions import Change
from schemas.database import connect_engine
from tests.brokers import Tansu
from tests.factories import meta_parameters
from tests.laws.harness import ENCODER, FENCED, NUM_ITEMS, TOPIC, Deploy, Deployment, Feeder, Fleet, query, stream
from tests.laws.judgement import assert_law

WHY = Change("test", "a swap")
NEWEST = """SELECT DISTINCT ON (partition) partition, value FROM innerloop.activations
    WHERE kind = 'meta_version' ORDER BY partition, from_offset DESC"""
ACTIVATED = "SELECT partition, from_offset, value FROM innerloop.activations WHERE kind = 'meta_version' ORDER BY 1, 2"
MADE_UNDER = """SELECT count(*), count(*) FILTER (WHERE e.meta_version IS DISTINCT FROM (
        SELECT a.value FROM innerloop.activations a WHERE a.topic = e.topic AND a.partition = e.partition
            AND a.kind = 'meta_version' AND a.from_offset <= e."offset" ORDER BY a.from_offset DESC LIMIT 1))
    FROM innerloop.prequential_events e"""
NOWHERE = """SELECT count(*) FROM innerloop.user_state u
    WHERE NOT EXISTS (SELECT FROM innerloop.meta_versions v WHERE v.version = u.meta_version)"""
TAKEN_BACK = "SELECT DISTINCT subject FROM innerloop.audit WHERE action = 'roll_back'"


class Swaps:
    """Gives the fleet one version after the other, and waits until every partition is under what it is to be."""

    def __init__(self, deployment: Deployment, fleet: Fleet) -> None:
        self.engine = connect_engine(deployment.database.writer_url)
        self.on = Watched(self.engine, Artefacts(deployment.home / "artefacts"), TOPIC)
        self.fleet, self.reader = fleet, deployment.database.reader_url

    def step(self, number: int) -> None:
        """Forward, and every fifth time by way of a canary that is taken back, or back to the version before."""
        if number % 5 == 4:
            promotion.return_to(self.on, versions.before(self.engine), WHY)
            return self.wait_for(lambda _: self.live)
        known = [item_id(item) for item in range(NUM_ITEMS - number % 7)]
        parameters = meta_parameters(known, text_dim=ENCODER.size, encoder=ENCODER.name, seed=number + 100)
        made = registry.register(self.engine, self.on.artefacts, parameters, metrics={}, provenance={}).version
        if number % 5 == 3:
            mine = promotion.begin_canary(self.on, made, 0.5, WHY, {})
            live = self.live
            self.wait_for(lambda partition: made if partition in mine else live)
            versions.reject(self.engine, made, WHY)
            return self.wait_for(lambda _: live)
        promotion.go_live(self.on, made, WHY)
        return self.wait_for(lambda _: made)

    @property
    def live(self) -> int:
        found = registry.live_version(self.engine)
        assert found is not None
        return found

    def wait_for(self, wanted: Callable[[int], int]) -> None:
        expected = [(partition, wanted(partition)) for partition in range(4)]
        self.fleet.wait_until(lambda: query(self.reader, NEWEST) == expected)


def swap_under_load(deployment: Deployment, *, swaps: int, kills: int, num_events: int, rate: float) -> None:
    sent, draw = stream(num_events), random.Random(swaps)
    settings = {"failpoints": "mid_swap=sleep:50"}  # so that kills meet it
    with Fleet(deployment, settings=settings) as fleet, Feeder(deployment.broker, sent, rate=rate) as feeder:
        fleet.wait_until(lambda: len(query(deployment.database.reader_url, NEWEST)) == 4)
        changes = Swaps(deployment, fleet)
        for number in range(swaps):
            changes.step(number)
            if draw.random() < kills / swaps:
                fleet.kill(draw)
        feeder.finish()
        fleet.wait_until_caught_up()
        changes.engine.dispose()
    assert {worker.code for worker in fleet.ended} <= {FENCED}
    assert_law(deployment, sent)
    assert_versions(deployment)


def assert_versions(deployment: Deployment) -> None:
    reader = deployment.database.reader_url
    ((num_predictions, num_wrong),) = query(reader, MADE_UNDER)
    assert num_predictions > 500
    assert num_wrong == 0, "every prediction was made under the version that was active at its offset"
    assert query(reader, NOWHERE) == [(0,)]
    taken_back = {int(subject.removeprefix("version ")) for (subject,) in query(reader, TAKEN_BACK)}
    for (partition, _, before), (same, _, after) in pairwise(query(reader, ACTIVATED)):
        assert partition != same or after >= before or before in taken_back


def test_five_swaps_under_load_leave_the_law_exact_and_every_prediction_its_version(
    broker: Tansu, deploy: Deploy
) -> None:
    swap_under_load(deploy(broker.address), swaps=5, kills=1, num_events=3000, rate=150)


@pytest.mark.long
def test_a_hundred_swaps_under_load_leave_the_law_exact_and_every_prediction_its_version(
    broker: Tansu, deploy: Deploy
) -> None:
    swap_under_load(deploy(broker.address), swaps=100, kills=10, num_events=60_000, rate=250)
