"""Requests held by lease: one holder at a time, the next one after it, and none for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, text

from pipeline import requests, trainer
from pipeline.requests import LeaseLost
from pipeline.trainer_lease import held
from schemas.database import connect_engine
from tests.conftest import Database

EXPIRE = (
    "UPDATE innerloop.retrain_requests SET leased_until = clock_timestamp() - interval '1 s' WHERE status = 'leased'"
)


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    made = connect_engine(database.writer_url, pool_size=8)
    yield made
    made.dispose()


def ask(engine: Engine, count: int = 1) -> None:
    insert = "INSERT INTO innerloop.retrain_requests (reason, window_from_ms, window_to_ms) VALUES ('drift', 1, 2)"
    with engine.begin() as connection:
        for _ in range(count):
            connection.execute(text(insert))


def run(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))


def rows(engine: Engine) -> list[tuple[object, ...]]:
    query = "SELECT status, leased_by, attempts, error FROM innerloop.retrain_requests ORDER BY request"
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def test_each_request_is_held_by_one_trainer_however_many_ask_at_once(engine: Engine) -> None:
    ask(engine, 3)
    with ThreadPoolExecutor(8) as pool:
        leased = list(pool.map(lambda number: requests.lease(engine, f"t{number}"), range(8)))
    held = [one.request for one in leased if one]
    assert sorted(held) == [1, 2, 3]
    assert requests.lease(engine, "late") is None


def test_an_expired_lease_passes_on_and_the_first_holder_is_told(engine: Engine) -> None:
    ask(engine)
    assert requests.lease(engine, "first")
    requests.renew(engine, 1, "first")
    run(engine, EXPIRE)
    second = requests.lease(engine, "second")
    assert second is not None
    assert second.attempts == 2
    with pytest.raises(LeaseLost):
        requests.renew(engine, 1, "first")
    with pytest.raises(LeaseLost):
        requests.fail(engine, 1, "first", "too late")
    assert rows(engine) == [("leased", "second", 2, None)]


def test_a_request_that_was_given_back_has_cost_no_attempt(engine: Engine) -> None:
    ask(engine)
    requests.lease(engine, "first")
    requests.release(engine, 1, "first")
    requests.release(engine, 1, "first")
    assert rows(engine) == [("pending", None, 0, None)]


def test_a_request_that_kills_every_trainer_is_given_up(engine: Engine) -> None:
    ask(engine)
    for number in range(3):
        assert requests.lease(engine, f"t{number}", attempts=3)
        run(engine, EXPIRE)
    assert requests.lease(engine, "t3", attempts=3) is None
    assert rows(engine) == [("failed", None, 3, "given up after 3 attempts, none of which ended")]


def test_a_request_is_held_as_long_as_its_trainer_works_and_the_trainer_hears_when_it_is_lost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(engine)
    left = "SELECT leased_until - clock_timestamp() > interval '20 s' FROM innerloop.retrain_requests"
    monkeypatch.setattr(requests, "LEASE_SECONDS", 0.05)
    beats = threading.Semaphore(0)
    assert requests.lease(engine, "one", seconds=1.0)
    with held(engine, 1, "one", beats.release) as lost:
        for _ in range(3):
            assert beats.acquire(timeout=60)
        with engine.connect() as connection:
            assert connection.scalar(text(left)), "a renewal holds it for half a minute"
        assert not lost.is_set()
        run(engine, "UPDATE innerloop.retrain_requests SET leased_by = 'two'")
        assert lost.wait(60)


def test_what_a_dead_trainer_held_is_free_within_a_minute() -> None:
    assert requests.LEASE_SECONDS + 2 * trainer.PAUSE_SECONDS < 60
