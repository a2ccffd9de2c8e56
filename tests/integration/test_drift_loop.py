"""The loop closes: what items mean changes, and version 2 comes of it by itself; what is no reason changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.synthetic import Plan, catalogue, draw_events
from tests.brokers import Tansu
from tests.conftest import Database
from tests.integration.drift_shop import (
    ALARMS,
    DECISIONS,
    QUICK,
    QUIET,
    REQUESTS,
    VERSIONS,
    Shop,
    meaning_changes,
    nothing_to_cure,
    plan,
)
from tests.laws.harness import Deployment, Launcher, query

pytestmark = pytest.mark.timeout(900)  # some 45 s of a core, but four processes that wait for each other

IN_USE = "SELECT max(value) FROM innerloop.activations WHERE kind = 'meta_version'"
RECORDED_SINCE = """SELECT count(*) FROM innerloop.prequential p, unnest(p.record_times) AS at WHERE at >= %s"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    started = Launcher()
    yield started
    started.close()


@pytest.fixture
def deployment(broker: Tansu, database: Database, tmp_path: Path, launcher: Launcher) -> Deployment:
    return Deployment(broker.address, database, tmp_path, launcher)


def shop(deployment: Deployment, of: Plan, *, quick: bool) -> Shop:
    return Shop(deployment, draw_events(of), list(catalogue(of)), QUICK if quick else {})


@pytest.mark.parametrize(
    ("quick", "further"),
    [(True, 3000), pytest.param(False, 200_000, marks=[pytest.mark.long, pytest.mark.timeout(3000)])],
)
def test_a_change_of_meaning_is_found_and_cured_by_one_retraining(
    deployment: Deployment, quick: bool, further: int
) -> None:
    most = 7000 if quick else 20_000
    with shop(deployment, meaning_changes(most + further), quick=quick) as running:
        running.feed(QUIET)
        assert running.rows(REQUESTS) == []
        assert running.feed_until(lambda: bool(running.rows(REQUESTS)), most=most // 2), running.rows(DECISIONS)
        asked = running.fed
        running.wait(lambda: running.rows(REQUESTS)[0][0] == "done")
        if quick:  # there are enough later events to judge on already
            running.wait(lambda: running.rows(VERSIONS)[1][1] != "challenger")
            running.wait(lambda: running.rows(IN_USE) == [(2,)])  # workers look for versions by the clock
        assert running.feed_until(lambda: running.live == 2, most=QUIET + most - asked), running.rows(VERSIONS)
        promoted = running.fed
        running.feed(further)

        alarm = next(label for _, label, _ in running.rows(ALARMS) if label >= QUIET)
        before, after = running.loss(QUIET - 3000, QUIET), running.loss(QUIET + 500, asked)
        cured = running.loss(promoted + 1000, running.fed)
        print(f"events from the change to the alarm {alarm - QUIET}, request {asked - QUIET}, live {promoted - QUIET}")
        print(f"loss {before:.3f} before, {after:.3f} changed, {cured:.3f} cured, {running.fed - promoted} events on")
        print(*running.rows(DECISIONS), *running.rows(VERSIONS), sep="\n")
        assert 0 < alarm - QUIET < 500
        assert after > 1.1 * before, "it matters"
        assert cured < 1.1 * before, "and is cured"
        assert len(running.rows(REQUESTS)) == 1, running.rows(DECISIONS)
        assert_judged_on_later_events_and_tried(running)


def assert_judged_on_later_events_and_tried(running: Shop) -> None:
    first, (number, status, request, by, _, learnt_to_ms, judgement) = running.rows(VERSIONS)
    assert (first[1], number, status, request, by) == ("retired", 2, "live", 1, "monitor")
    assert judgement["gain"][1] > 0, "the lower bound of the gain"
    ((later,),) = query(running.reader, RECORDED_SINCE, learnt_to_ms)
    assert judgement["events"] <= later, "only events later than its training data count"
    assert judgement["canary"]["events"] >= judgement["canary"]["rules"]["canary_events"]
    steps = running.rows("SELECT action, actor FROM innerloop.audit WHERE subject = 'version 2' ORDER BY audit")
    assert steps[-2:] == [("canary", "trainer"), ("promote", "monitor")]
    assert running.rows("SELECT count(*) FROM innerloop.law WHERE broken") == [(0,)]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("quick", "length"),
    [(True, 4000), (False, 30_000)],
)
def test_inverted_users_other_input_and_improvement_ask_for_no_retraining(
    deployment: Deployment, quick: bool, length: int
) -> None:
    settings = QUICK if quick else {}
    items = list(catalogue(plan(length)))
    with Shop(deployment, nothing_to_cure(length), items, settings, trains=False) as running:
        running.feed(QUIET)
        for what in ("one user in a hundred inverted", "other kinds and other exposure", "improvement"):
            running.feed(length)
            print(what, running.loss(running.fed - length // 2, running.fed), running.rows(ALARMS))
            assert running.rows(REQUESTS) == [], what
        print(*running.rows(DECISIONS), sep="\n")
