"""A database that fails in the middle of a batch: what passes is waited out, and a batch has one effect."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import Any

import psycopg2
import pytest
import torch

from pipeline.monitor import Monitor
from pipeline.session import StoreUnavailable
from pipeline.settings import Settings
from tests.conftest import Database
from tests.test_loop import LAW, RECORD, STATE, assign, feed, fill, forget_all, log, make_loop, query, sizes

DAY_SECONDS = 86_400.0
APPLIED = "SELECT sum(applied) FROM innerloop.stream_position"
FAILS_TWICE = """CREATE SEQUENCE public.failures; GRANT USAGE ON SEQUENCE public.failures TO PUBLIC;
    CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('public.failures') <= 2 THEN RAISE EXCEPTION 'made to fail' USING ERRCODE = '{code}'; END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER fails BEFORE {what} FOR EACH STATEMENT EXECUTE FUNCTION public.fail()"""
WRITES = "UPDATE ON innerloop.stream_position"


@pytest.fixture
def url(database: Database) -> str:
    fill(database.owner_url)
    torch.set_num_threads(1)
    return database.writer_url


def execute(url: str, statement: str) -> None:
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        connection.commit()


def rows(database: Database) -> list[Any]:
    return [query(database.owner_url, statement) for statement in (STATE, LAW, RECORD)]


def undisturbed(url: str, database: Database) -> list[Any]:
    """What a log leaves; taken away again."""
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(300), sizes(1, 90))
    expected = rows(database)
    forget_all(database)
    return expected


@pytest.mark.parametrize(
    "code",
    ["40001", "40P01", "55P03", "53100", "53300", "25006"],
    ids=["serialization", "deadlock", "lock timeout", "disk full", "too many connections", "read-only after failover"],
)
def test_a_failure_that_passes_is_waited_out_and_makes_no_dead_letter(code: str, url: str, database: Database) -> None:
    expected = undisturbed(url, database)
    loop = make_loop(url)
    assign(loop)
    execute(database.superuser_url, FAILS_TWICE.format(code=code, what=WRITES))
    feed(loop, log(300), sizes(1, 90), ahead=True)
    assert query(database.superuser_url, "SELECT last_value > 2 FROM public.failures") == [(True,)]
    assert rows(database) == expected


def test_a_monitor_waits_for_a_server_that_is_read_only_after_a_failover(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(300), sizes(1, 90))
    execute(database.superuser_url, FAILS_TWICE.format(code="25006", what="INSERT ON innerloop.drift_monitors"))
    monitor = Monitor(Settings.load(database_url=url, broker="127.0.0.1:1"), stop := threading.Event())
    monkeypatch.setattr(monitor, "_look_out", lambda _read: stop.set())  # after its first turn
    assert monitor.run() == 0
    assert query(database.superuser_url, "SELECT last_value > 2 FROM public.failures") == [(True,)]
    assert query(url, "SELECT sum(applied) FROM innerloop.drift_positions") == query(url, APPLIED)


@pytest.mark.parametrize("held", ["a row", "the table"])
def test_a_lock_that_somebody_holds_is_waited_for_two_seconds_at_a_time(
    held: str, url: str, database: Database
) -> None:
    expected = undisturbed(url, database)
    loop = make_loop(url)
    assign(loop)
    with closing(psycopg2.connect(database.owner_url)) as holder, holder.cursor() as cursor:
        cursor.execute("SELECT FROM innerloop.stream_position FOR UPDATE" if held == "a row"
                       else "LOCK TABLE innerloop.user_state IN ACCESS EXCLUSIVE MODE")  # fmt: skip
        timeouts = []

        def let_go() -> None:  # once the worker has been told to try again
            timeouts.append(1)
            holder.rollback()

        loop.patiently.alive = let_go
        feed(loop, log(300), sizes(1, 90))
    assert timeouts, "nobody had to wait"
    assert rows(database) == expected


def test_a_long_transaction_of_a_reader_holds_nobody_up(url: str, database: Database) -> None:
    expected = undisturbed(url, database)
    loop = make_loop(url)
    assign(loop)
    with closing(psycopg2.connect(database.reader_url)) as reader, reader.cursor() as cursor:
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        cursor.execute("SELECT count(*) FROM innerloop.scores")
        loop.patiently.alive = lambda: pytest.fail("the worker waited")
        feed(loop, log(300), sizes(1, 90))
        cursor.execute("SELECT count(*) FROM innerloop.scores")
        assert cursor.fetchall() == [(0,)], "its snapshot is as it was"
    assert rows(database) == expected


@pytest.mark.parametrize("ahead", [False, True])
def test_a_lost_answer_to_commit_has_one_effect(
    ahead: bool, url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(url, database)
    loop = make_loop(url)
    assign(loop)
    lost, original = iter([True]), loop.store.settle

    def settle() -> float | None:
        committed_at = original()
        if committed_at is not None and next(lost, False):
            raise StoreUnavailable("the connection was reset before the answer came")
        return committed_at

    monkeypatch.setattr(loop.store, "settle", settle)
    feed(loop, log(300), sizes(1, 90), ahead=ahead)
    assert next(lost, None) is None, "no answer was lost"
    assert rows(database) == expected


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_a_day_off_changes_no_row(
    days: int, url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(url, database)
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + days * DAY_SECONDS)
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(300), sizes(1, 90))
    assert rows(database) == expected
