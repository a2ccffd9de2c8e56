"""Trainers killed at any place: one version per request, no orphan, and nobody waits for a dead one."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from contextlib import closing
from datetime import timedelta
from typing import Any

import psycopg2
import pytest
import torch
from sqlalchemy import text

from pipeline import drift_reading, promotion, registry, versions
from pipeline.artefacts import Artefacts
from pipeline.erasures import ask as wish
from pipeline.promotion import Watched
from pipeline.requests import LEASE_SECONDS
from pipeline.settings import Settings
from pipeline.synthetic import item_id
from pipeline.trainer import Trainer
from pipeline.versions import Change
from schemas.database import connect_engine
from tests.brokers import Tansu
from tests.factories import meta_parameters
from tests.laws.harness import (
    ENCODER,
    NUM_ITEMS,
    TOPIC,
    Deploy,
    Deployment,
    Feeder,
    Worker,
    lag,
    query,
    send,
    stream,
    wait_until,
)  # fmt: skip

PLACES = ("mid_artifact_write", "after_artifact_before_publish", "after_publish")
REQUESTS = "SELECT request, status, version, attempts, error FROM innerloop.retrain_requests ORDER BY request"


@pytest.fixture
def deployment(broker: Tansu, deploy: Deploy) -> Deployment:
    deployment = deploy(broker.address)
    send(broker.address, stream(1500, users=100))
    return deployment


def ask(deployment: Deployment, *, count: int = 1) -> None:
    window = (int(time.time() - 3600) * 1000, int(time.time() + 1) * 1000)
    with closing(psycopg2.connect(deployment.database.writer_url)) as connection, connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO innerloop.retrain_requests (reason, window_from_ms, window_to_ms) VALUES ('drift', %s, %s)",
            [window] * count,
        )
        connection.commit()


def expire(deployment: Deployment) -> None:
    """As if the lease of whoever died had run out."""
    with closing(psycopg2.connect(deployment.database.writer_url)) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE innerloop.retrain_requests SET leased_until = now() WHERE status = 'leased'")
        connection.commit()


def trainer(deployment: Deployment, name: str, *words: str, **settings: Any) -> Worker:
    more: dict[str, Any] = {"trainer_attempts": 100, "promote_events": 10**6, **settings}  # nothing is judged here
    return Worker(deployment, name, words=("trainer", *words), **more)


def assert_one_version_each_and_no_orphan(deployment: Deployment, num_requests: int) -> None:
    rows = query(deployment.database.reader_url, REQUESTS)
    assert [row[1] for row in rows] == ["done"] * num_requests, rows
    made = query(
        deployment.database.reader_url,
        "SELECT request, version, sha256, status FROM innerloop.meta_versions WHERE request IS NOT NULL ORDER BY 1",
    )
    assert [row[:2] for row in made] == [(row[0], row[2]) for row in rows]
    known = query(deployment.database.reader_url, "SELECT DISTINCT sha256 FROM innerloop.meta_versions")
    names = Artefacts(deployment.home / "artefacts").names()
    assert names == sorted(f"{sha256}.safetensors" for (sha256,) in known)
    assert query(deployment.database.owner_url, "SELECT * FROM innerloop.artefact_writes") == []


def test_a_request_leads_to_a_challenger_that_learnt_from_its_window(deployment: Deployment) -> None:
    ask(deployment)
    with trainer(deployment, "trainer", "--once") as process:
        assert process.wait() == 0, process.log
    assert_one_version_each_and_no_orphan(deployment, 1)
    ((status, parent, start, end, begun, users),) = query(
        deployment.database.reader_url,
        "SELECT status, parent, window_from_ms, window_to_ms, provenance -> 'begun_from', provenance -> 'users' "
        "FROM innerloop.meta_versions WHERE request = 1",
    )
    assert (status, parent, begun) == ("challenger", 1, 1)
    assert start < end < time.time() * 1000
    assert users > 50


@pytest.mark.parametrize("place", PLACES)
def test_a_trainer_killed_at_a_bad_moment_leaves_one_version_and_no_orphan(deployment: Deployment, place: str) -> None:
    ask(deployment)
    with trainer(deployment, "killed", failpoints=f"{place}=crash") as process:
        assert process.wait() == -signal.SIGKILL, process.log
    expire(deployment)
    with trainer(deployment, "next", "--once") as process:
        assert process.wait() == 0, process.log
    assert_one_version_each_and_no_orphan(deployment, 1)
    assert query(deployment.database.reader_url, REQUESTS)[0][3] == 2


def test_two_trainers_share_the_requests_and_sigterm_gives_one_back(deployment: Deployment) -> None:
    ask(deployment, count=3)
    with trainer(deployment, "stopped", failpoints="mid_artifact_write=sleep:1500") as process:
        wait_until(lambda: query(deployment.database.reader_url, REQUESTS)[0][1] == "leased", process)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0, process.log
    assert {row[1] for row in query(deployment.database.reader_url, REQUESTS)} <= {"pending", "done"}
    with trainer(deployment, "one", "--once") as one, trainer(deployment, "other", "--once") as other:
        assert (one.wait(), other.wait()) == (0, 0), one.log + other.log
    assert_one_version_each_and_no_orphan(deployment, 3)


def test_who_asks_to_be_forgotten_is_left_out_and_who_asks_while_it_learns_marks_the_version(
    deployment: Deployment,
) -> None:
    ask(deployment)
    keys = Counter(message.key for message in stream(1500, users=100) if message.key)
    before, *meanwhile = (key.decode() for key, _ in keys.most_common(3))
    wish(deployment.broker, "erasures", before)

    def tell(stage: str, done: int, total: int | None) -> None:
        if (stage, done) == ("fit tables on everything", 0):
            for user in (*meanwhile, "a-stranger"):
                wish(deployment.broker, "erasures", user)

    settings = Settings(**deployment.values(torch_threads=torch.get_num_threads(), promote_events=10**6))
    engine = connect_engine(deployment.database.writer_url)
    Trainer(settings, engine, deployment.broker, tell).work(once=True)
    engine.dispose()
    ((users, marks),) = query(
        deployment.database.reader_url,
        "SELECT provenance -> 'users', ARRAY[provenance -> 'erased_before', provenance -> 'erased_meanwhile'] "
        "FROM innerloop.meta_versions WHERE request = 1",
    )
    assert marks == [1, 2], "the stranger taught it nothing"
    assert users < len(keys), "who had asked before is not learnt from"


def test_a_request_that_holds_nothing_to_learn_from_fails_with_its_reason(deployment: Deployment) -> None:
    with closing(psycopg2.connect(deployment.database.writer_url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO innerloop.retrain_requests (reason, window_from_ms, window_to_ms) VALUES ('drift', 1, 2)"
        )
        connection.commit()
    with trainer(deployment, "trainer", "--once") as process:
        assert process.wait() == 1
    assert "no event that the broker still has" in query(deployment.database.reader_url, REQUESTS)[0][4]


def test_frozen_a_trainer_leaves_requests_alone(deployment: Deployment) -> None:
    ask(deployment)
    engine = connect_engine(deployment.database.writer_url)
    drift_reading.freeze(engine, "sale", "test")
    with trainer(deployment, "frozen", "--once") as process:
        assert process.wait() == 0, process.log
    assert query(deployment.database.reader_url, REQUESTS) == [(1, "pending", None, 0, None)]
    drift_reading.unfreeze(engine, "test")
    engine.dispose()


def sure_of_nonsense(deployment: Deployment) -> Watched:
    """Version 2, random and very sure, is live in place of version 1."""
    engine = connect_engine(deployment.database.writer_url)
    on = Watched(engine, Artefacts(deployment.home / "artefacts"), TOPIC)
    known = [item_id(item) for item in range(NUM_ITEMS)]
    parameters = meta_parameters(known, text_dim=ENCODER.size, encoder=ENCODER.name, seed=7, tau=8.0)
    registry.register(engine, on.artefacts, parameters, metrics={}, provenance={})
    promotion.go_live(on, 2, Change("test", "to be worse"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE innerloop.meta_versions SET status = 'rejected' WHERE version = 1"))
    return on


FEW = {"promote_events": 150, "promote_users": 20}
STATUSES = "SELECT version, status FROM innerloop.meta_versions ORDER BY version"


def test_a_better_challenger_becomes_a_canary_and_when_it_fits_again_it_returns_untrained(
    deployment: Deployment,
) -> None:
    on = sure_of_nonsense(deployment)
    with deployment.worker() as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
    ask(deployment)
    with trainer(deployment, "first", "--once", **FEW) as process:
        assert process.wait() == 0, process.log
    made = versions.shown(on.engine, 3)
    assert made.status == "canary", made.reason
    assert made.judgement["gain"][1] > 0
    assert made.judgement["events"] < 400, "only events later than its training data count"

    promotion.go_live(on, 3, Change("test", "it is better"))
    promotion.go_live(on, 2, Change("test", "as after a change of taste"))
    ask(deployment)
    with trainer(deployment, "second", "--once", **FEW) as process:
        assert process.wait() == 0, process.log
    assert query(deployment.database.reader_url, STATUSES) == [(1, "rejected"), (2, "live"), (3, "canary")]
    assert [row[1:3] for row in query(deployment.database.reader_url, REQUESTS)] == [("done", 3), ("done", 3)]
    reason = versions.shown(on.engine, 3).reason
    on.engine.dispose()
    assert reason.startswith("fits again, nothing was trained; better: gain")


def test_a_challenger_that_is_worse_is_rejected_with_its_figures(deployment: Deployment) -> None:
    on = sure_of_nonsense(deployment)
    with deployment.worker() as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
    ask(deployment)
    with trainer(deployment, "first", "--once") as process:
        assert process.wait() == 0, process.log
    promotion.go_live(on, 3, Change("test", "it is better"))
    with on.engine.begin() as connection:  # the random one comes as if it had been trained
        connection.execute(
            text(
                "UPDATE innerloop.meta_versions SET status = 'challenger', window_from_ms = 0, window_to_ms = "
                "(SELECT window_to_ms FROM innerloop.meta_versions WHERE version = 3) WHERE version = 2"
            )
        )
    with trainer(deployment, "second", "--once", **FEW) as process:
        assert process.wait() == 0, process.log
    found = versions.shown(on.engine, 2)
    on.engine.dispose()
    assert (found.status, found.changed_by) == ("rejected", "trainer")
    assert found.reason.startswith("not shown to be better: gain -")
    assert found.judgement["gain"][2] < 0


def test_a_version_that_does_worse_is_taken_back_by_the_monitor_while_events_flow(deployment: Deployment) -> None:
    watched = {"drift_seconds": 0.3, "canary_events": 200}
    with deployment.worker() as worker, Worker(deployment, "monitor", words=("monitor",), **watched) as monitor:
        wait_until(lambda: lag(deployment) == 0, worker)
        on = sure_of_nonsense(deployment)
        with on.engine.begin() as connection:
            connection.execute(text("UPDATE innerloop.meta_versions SET status = 'retired' WHERE version = 1"))
        with Feeder(deployment.broker, stream(3000, users=100, seed=2), rate=150) as feeder:
            wait_until(lambda: query(deployment.database.reader_url, STATUSES)[0][1] == "live", monitor)
            feeder.finish()
        found = versions.shown(on.engine, 2)
        on.engine.dispose()
    assert (found.status, found.changed_by) == ("rejected", "monitor")
    assert found.reason.startswith("worse than expected"), found.reason


HELD = "SELECT leased_by, leased_until, clock_timestamp() FROM innerloop.retrain_requests"


@pytest.mark.long
def test_a_trainer_killed_amid_its_job_has_a_successor_within_a_minute(deployment: Deployment) -> None:
    """By the defaults: a lease of 30 s has to run out. All times are the database's."""
    ask(deployment)
    half_written = "SELECT count(*) FROM innerloop.artefact_writes"
    with trainer(deployment, "killed", failpoints="mid_artifact_write=sleep:600000") as killed:
        wait_until(lambda: query(deployment.database.owner_url, half_written) == [(1,)], killed)
        with trainer(deployment, "successor") as successor:
            successor.wait_until_ready()
            ((owner, _, killed_at),) = query(deployment.database.reader_url, HELD)
            killed.signal(signal.SIGKILL)
            assert killed.wait() == -signal.SIGKILL
            ((_, free_at, _),) = query(deployment.database.reader_url, HELD)
            wait_until(lambda: query(deployment.database.reader_url, HELD)[0][0] != owner, successor)
            ((owner, until, _),) = query(deployment.database.reader_url, HELD)
            taken_at = until - timedelta(seconds=LEASE_SECONDS)
            print(f"taken over {(taken_at - killed_at).total_seconds():.1f} s after the kill")
            assert owner.endswith(f"-{successor.process_id}")
            assert free_at <= taken_at <= killed_at + timedelta(seconds=60)
            wait_until(lambda: query(deployment.database.reader_url, REQUESTS)[0][1] == "done", successor)
            successor.signal(signal.SIGTERM)
            assert successor.wait() == 0, successor.log
    assert query(deployment.database.reader_url, REQUESTS)[0][3] == 2, "attempts"
    assert_one_version_each_and_no_orphan(deployment, 1)


@pytest.mark.long
def test_twenty_kills_of_trainers_leave_one_version_per_request(deployment: Deployment) -> None:
    draw, settings = random.Random(3), dict[str, Any](trainer_attempts=100)
    ask(deployment, count=4)
    for number in range(20):
        place = draw.choice([*PLACES, None])
        failpoint = {"failpoints": f"{place}=crash"} if place else {}
        with trainer(deployment, f"killed-{number}", **settings, **failpoint) as process:
            if place is None:
                process.wait_until_ready()
                time.sleep(draw.uniform(0, 6))
                process.signal(signal.SIGKILL)
            else:
                deadline = time.monotonic() + 60
                while process.code is None and time.monotonic() < deadline:
                    time.sleep(0.1)
        expire(deployment)
        if all(row[1] == "done" for row in query(deployment.database.reader_url, REQUESTS)):
            ask(deployment)
    with trainer(deployment, "last", "--once") as process:
        assert process.wait() == 0, process.log
    assert_one_version_each_and_no_orphan(deployment, len(query(deployment.database.reader_url, REQUESTS)))
