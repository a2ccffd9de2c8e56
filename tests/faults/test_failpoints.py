"""A worker that dies at the named places of its batch leaves the law exact: its next life goes on from the position."""

from __future__ import annotations

import pytest

from tests.brokers import Tansu
from tests.conftest import Database
from tests.laws.harness import Deploy, lag, position, send, stream, wait_until
from tests.laws.judgement import assert_as_twin, assert_law

KILLED = -9
NUM_LIVES = 2


@pytest.mark.parametrize(
    ("failpoint", "commits"),
    [
        ("before_commit=crash", False),
        ("after_commit=crash", True),
        ("before_acknowledge=crash", True),
    ],
)
def test_a_crash_at_a_failpoint_leaves_the_law_exact(
    failpoint: str, commits: bool, broker: Tansu, deploy: Deploy, database: Database, twin: Database
) -> None:
    deployment, sent = deploy(broker.address), stream(1000)
    send(broker.address, sent)
    passed = [0]
    for life in range(NUM_LIVES):
        # A group of its own spares each life the wait until the broker gives up the one before.
        with deployment.worker(f"life-{life}", failpoints=failpoint, batch_events=64, group=f"life-{life}") as worker:
            assert worker.wait() == KILLED, worker.log
        passed.append(position(database))
    if commits:  # each life brings exactly one batch into the database, and no other brings it again
        assert passed == sorted(set(passed)), "every life must have committed something"
    else:
        assert passed == [0] * (NUM_LIVES + 1)
    assert passed[-1] < len(sent)
    with deployment.worker("survivor") as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
    assert_as_twin(deployment, assert_law(deployment, sent), twin)
