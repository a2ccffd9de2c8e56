"""The monitor against a real database: read exactly once, killed at any moment, blind and saying so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import psycopg2
import pytest
from psycopg2.extras import execute_values

from models.encoder import resolve_encoder
from pipeline import monitor as monitoring
from pipeline import registry, topics
from pipeline.artefacts import Artefacts
from pipeline.drift import Observations
from pipeline.drift_decision import Thresholds
from pipeline.drift_reading import drift_status
from pipeline.feeding import feed
from pipeline.lines import open_source
from pipeline.monitor import Monitor
from pipeline.monitor_probe import _positives, gain_of_refit
from pipeline.outbox import Outbox
from pipeline.produce import Convert, Outgoing, Pace, interaction_record
from pipeline.settings import Settings
from pipeline.topics import BrokerUnavailable
from pipeline.training_data import NothingToLearn
from schemas.database import connect_engine
from tests.benchmarks.drift_streams import START_MS, coins, observed
from tests.brokers import Tansu
from tests.conftest import Database
from tests.factories import event, meta_parameters
from tests.test_loop import query, query_write

QUICK = {
    "drift_seconds": 0.05, "drift_days": 0, "drift_labels": 500, "drift_users": 200, "drift_new_labels": 1500,
    "drift_cost": 1.0,
}  # fmt: skip
UNRECORDED = "UPDATE innerloop.stream_position SET next_offset = next_offset + 5, applied = applied + 5"
SAVED = "SELECT name, numbers, md5(inputs) FROM innerloop.drift_state ORDER BY name"


def losses(*rates: tuple[int, float], seed: int = 0, scale: float = 4.0) -> Observations:
    """Labels whose loss is `scale` with these probabilities, one after the other."""
    rng = np.random.default_rng(seed)
    drawn = coins(np.concatenate([np.full(num, rate) for num, rate in rates]), rng) * scale + 1.0
    return observed(drawn, rng)


def write(url: str, seen: Observations, *, partitions: int = 2, batch: int = 100, version: int = 1) -> None:
    """The record of these labels and the positions that go with it, as a worker's transactions leave them."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT partition, next_offset FROM innerloop.stream_position")
        at = dict.fromkeys(range(partitions), 0) | dict(cursor.fetchall())
        for start in range(0, len(seen), batch):
            piece, partition = seen.at(slice(start, start + batch)), start // batch % partitions
            cursor.execute(*_row(piece, partition, at[partition], version))
            at[partition] += len(piece)
        rows = [("interactions", partition, 0, offset, offset) for partition, offset in at.items()]
        execute_values(
            cursor,
            """INSERT INTO innerloop.stream_position (topic, partition, first_offset, next_offset, applied) VALUES %s
            ON CONFLICT (topic, partition) DO UPDATE
            SET next_offset = excluded.next_offset, applied = excluded.applied""",
            rows,
        )
        connection.commit()


def _row(piece: Observations, partition: int, start: int, version: int) -> tuple[str, tuple[Any, ...]]:
    num, ones = len(piece), [1] * len(piece)
    names = ["home"]
    scenes = [1 if scene else 0 for scene in piece.scenes]
    users = [f"u{user}" for user in piece.users.tolist()]
    counts = np.bincount(piece.types, minlength=7).tolist()
    columns = (
        [*range(start, start + num)], piece.event_ms.tolist(), users, piece.items.tolist(), piece.types.tolist(),
        piece.num_events.tolist(), piece.loss.tolist(), piece.start.tolist(), ones, ones, ones,
        piece.event_ms.tolist(), piece.new_items.tolist(), scenes, names, counts,
    )  # fmt: skip
    kinds = ("bigint", "bigint", "text", "int", "smallint", "int", "real", "real", "int", "int", "int", "bigint",
             "boolean", "smallint", "text", "int")  # fmt: skip
    places = ", ".join(f"%s::{kind}[]" for kind in kinds)
    return (
        "INSERT INTO innerloop.prequential SELECT 'interactions', %s, %s, %s, to_timestamp(%s / 1000.0), %s, " + places,
        (partition, start, start + num, int(piece.event_ms[-1]), version, *columns),
    )


@pytest.fixture
def url(database: Database) -> str:
    query_write(
        database.owner_url,
        "INSERT INTO innerloop.meta_versions (status, artefact, sha256, encoder) VALUES ('live', 'x', 'x', 'test')",
    )
    return database.writer_url


@contextmanager
def watching(url: str, *, gain: float | None = None, **settings: Any) -> Iterator[Monitor]:
    """A monitor that holds the lock and has loaded its state; its probe answers at once."""
    chosen = Settings.load(database_url=url, **{**QUICK, **settings})
    found = Monitor(chosen, threading.Event())
    found._cases._beyond = lambda *_: gain  # type: ignore[assignment,method-assign]
    assert found._store.acquire()
    with found._store.transaction() as cursor:
        found._load(cursor)
    yield found
    found._store.close()


def read_all(monitor: Monitor) -> None:
    while monitor.tick():
        pass
    for _ in range(20):  # a probe's answer is taken at the next look
        monitor.tick()
        time.sleep(0.01)


def test_everything_is_read_once_and_a_second_monitor_goes_on_where_the_first_ended(url: str) -> None:
    write(url, losses((3000, 0.2)))
    with watching(url) as first:
        read_all(first)
        assert first._drift.num_fed == 3000
    write(url, losses((1000, 0.2), seed=1))
    with watching(url) as second:
        read_all(second)
        assert second._drift.num_fed == 4000
    assert query(url, "SELECT sum(next_offset), sum(applied) FROM innerloop.drift_positions") == [(4000, 4000)]


def test_ticks_in_between_and_restarts_leave_the_same_state(url: str, database: Database) -> None:
    seen = losses((4000, 0.2), (1000, 0.5))
    with watching(url) as monitor:
        for start in range(0, 5000, 500):
            write(url, seen.at(slice(start, start + 500)))
            read_all(monitor)
    whole = query(url, SAVED)
    for table in ("drift_state", "drift_positions", "drift_alarms", "drift_decisions"):
        query_write(database.owner_url, f"TRUNCATE innerloop.{table}")
    query_write(database.owner_url, "TRUNCATE innerloop.prequential, innerloop.stream_position")
    for start in range(0, 5000, 500):
        write(url, seen.at(slice(start, start + 500)))
        with watching(url) as monitor:
            read_all(monitor)
    again = query(url, SAVED)
    assert [row[::2] for row in again] == [row[::2] for row in whole]
    numbers, expected = (next(row[1] for row in rows if row[0] == "monitor") for rows in (again, whole))
    for name in expected:
        assert numbers[name] == expected[name], name


@pytest.mark.parametrize("place", ["before_monitor_commit", "after_monitor_commit"])
def test_a_monitor_that_is_killed_misses_nothing_and_reads_nothing_twice(url: str, place: str) -> None:
    seen = losses((2000, 0.2), (800, 0.5))
    write(url, seen)
    environment = {
        **os.environ,
        "INNERLOOP_DATABASE_URL": url,
        "INNERLOOP_BROKER": "none:1",
        "INNERLOOP_DRIFT_SECONDS": "0.05",
    }
    command = [sys.executable, "-m", "pipeline.cli", "monitor"]
    killed = subprocess.run(
        command, env=environment | {"INNERLOOP_FAILPOINTS": f"{place}=crash"}, capture_output=True, timeout=120
    )
    assert killed.returncode == -9
    assert json.loads(killed.stdout.splitlines()[0])["event"] == "ready"
    with watching(url) as monitor:
        read_all(monitor)
        assert monitor._drift.num_fed == 2800
    assert query(url, "SELECT sum(applied) FROM innerloop.drift_positions") == [(2800,)]
    alarms = query(url, "SELECT label FROM innerloop.drift_alarms WHERE series = 'loss' AND worse")
    assert len(alarms) == 1


def test_a_monitor_ends_cleanly_and_another_stands_by_until_then(url: str) -> None:
    environment = {
        **os.environ,
        "INNERLOOP_DATABASE_URL": url,
        "INNERLOOP_BROKER": "none:1",
        "INNERLOOP_DRIFT_SECONDS": "0.05",
    }
    command = [sys.executable, "-m", "pipeline.cli", "monitor"]
    first, second = (
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    try:
        for one in (first, second):
            assert one.stdout is not None
        ready = _first_line(first, second)
        ready.terminate()
        _, errors = ready.communicate(timeout=60)
        assert ready.returncode == 0, errors
        other = second if ready is first else first
        assert other.stdout is not None
        assert json.loads(other.stdout.readline())["event"] == "ready"
        other.terminate()
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 0, errors
    finally:
        for one in (first, second):
            one.kill()
            one.communicate()


def _first_line(first: Any, second: Any) -> Any:
    """Whichever of two processes says that it is ready; the other must not."""
    import selectors

    with selectors.DefaultSelector() as ready:
        for one in (first, second):
            ready.register(one.stdout, selectors.EVENT_READ, one)
        found = ready.select(timeout=120)
        assert len(found) == 1
        return found[0][0].data


def decisions(url: str) -> list[tuple[str, str]]:
    rows = query(url, "SELECT verdict, reason FROM innerloop.drift_decisions ORDER BY decision")
    return [(verdict, reason) for verdict, reason in rows]


def test_a_drift_is_found_decided_once_and_asked_for_once(url: str) -> None:
    write(url, losses((4000, 0.2), (3000, 0.5)))
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
    assert decisions(url)[-1][0] == "retrain"
    requests = query(url, "SELECT decision, window_from_ms, window_to_ms, status FROM innerloop.retrain_requests")
    assert len(requests) == 1
    assert requests[0][3] == "pending"
    assert START_MS < requests[0][1] < requests[0][2]
    write(url, losses((3000, 0.5), seed=1))
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
    assert query(url, "SELECT count(*) FROM innerloop.retrain_requests") == [(1,)]


@pytest.mark.parametrize(
    ("gain", "changes", "reason"),
    [
        (0.0, {}, "not worth it"),
        (0.3, {"drift_days": 1}, "0 whole days"),
    ],
)
def test_what_does_not_pay_is_refused_in_a_row_and_nothing_is_asked_for(
    url: str, gain: float, changes: dict[str, Any], reason: str
) -> None:
    write(url, losses((4000, 0.2), (3000, 0.5)))
    with watching(url, gain=gain, **changes) as monitor:
        read_all(monitor)
    assert decisions(url)[-1][0] == "no"
    assert reason in decisions(url)[-1][1]
    assert query(url, "SELECT count(*) FROM innerloop.retrain_requests") == [(0,)]


def test_frozen_nothing_is_asked_for_until_it_is_not(url: str) -> None:
    query_write(url, "INSERT INTO innerloop.drift_freezes (reason) VALUES ('release week')")
    write(url, losses((4000, 0.2), (3000, 0.5)))
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
    assert decisions(url)[-1][0] == "wait"
    assert "frozen: release week" in decisions(url)[-1][1]
    query_write(url, "UPDATE innerloop.drift_freezes SET until_at = now()")
    write(url, losses((500, 0.5), seed=1))
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
    assert decisions(url)[-1][0] == "retrain"


def test_inverted_labels_of_one_user_in_a_hundred_are_an_alarm_and_no_retraining(url: str) -> None:
    seen = losses((16_000, 0.2))
    busy = np.random.default_rng(3).random(16_000) < 0.08
    seen.users[busy] %= 20  # one in a hundred users, and not the laziest
    inverted = (np.arange(16_000) > 6000) & (seen.users < 20)
    seen.loss[inverted] = 20.0
    write(url, seen)
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
    assert query(url, "SELECT count(*) > 0 FROM innerloop.drift_alarms WHERE worse") == [(True,)]
    assert decisions(url)[-1][0] == "no"
    assert query(url, "SELECT count(*) FROM innerloop.retrain_requests") == [(0,)]


def test_improvement_and_other_users_at_the_same_loss_ask_for_nothing(url: str) -> None:
    write(url, losses((4000, 0.5), (3000, 0.2)))
    shifted = losses((4000, 0.2), seed=2)
    shifted.new_items[:] = True
    shifted.items[:] = 7
    write(url, shifted)
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
    assert query(url, "SELECT count(*) FROM innerloop.retrain_requests") == [(0,)]
    (mix,) = query(url, "SELECT inputs FROM innerloop.drift_monitors")[0]
    assert mix["item_mix_distance"] > 0.1, "the shift must be reported"
    assert mix["new_items"][1] > mix["new_items"][0]


def test_losses_that_are_no_numbers_blind_the_monitor_and_it_says_so(url: str) -> None:
    write(url, losses((1000, 0.2)))
    broken = losses((200, 0.2), seed=1)
    broken.loss[:] = np.nan
    write(url, broken)
    with watching(url) as monitor:
        read_all(monitor)
        assert "losses are no numbers" in query(url, "SELECT blind FROM innerloop.drift_monitors")[0][0]
        write(url, losses((3000, 0.2), seed=2))
        read_all(monitor)
    assert query(url, "SELECT blind FROM innerloop.drift_monitors") == [("",)]


def test_applied_events_without_a_record_blind_the_monitor(url: str, database: Database) -> None:
    write(url, losses((1000, 0.2)))
    with watching(url) as monitor:
        read_all(monitor)
        query_write(database.owner_url, UNRECORDED)
        read_all(monitor)
    assert query(url, "SELECT blind FROM innerloop.drift_monitors") == [("10 applied events have left no record",)]


def test_a_missing_record_is_told_also_while_other_events_come(url: str, database: Database) -> None:
    write(url, losses((1000, 0.2)))
    with watching(url) as monitor:
        read_all(monitor)
        query_write(database.owner_url, UNRECORDED)
        write(url, losses((100, 0.2), seed=1))
        assert monitor.tick() > 0
    assert "have left no record" in query(url, "SELECT blind FROM innerloop.drift_monitors")[0][0]


def test_a_stream_that_stands_still_while_events_wait_is_told(
    url: str, broker: Tansu, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = "SELECT blind FROM innerloop.drift_monitors"
    topics.ensure_topics(broker.address, {"interactions": {}}, 2)
    with watching(url, broker=broker.address) as monitor:
        monitor._look_out(0)
        monkeypatch.setattr(monitoring, "STILL_SECONDS", 0.0)
        monitor._look_out(0)
        monitor.tick()
        assert query(url, blind) == [("",)], "nothing to apply: it is a quiet night"
        with Outbox(broker.address, "interactions") as outbox:
            for number in range(7):
                outbox.send(number, b"u1", event("u1", "a", f"e{number}"))
        monitor._look_out(0)
        monitor.tick()
        assert query(url, blind)[0][0].startswith("the stream stands still: 7 events wait")
        write(url, losses((100, 0.2)))
        monitor._look_out(monitor.tick())
        monitor.tick()
        assert query(url, blind) == [("",)]
        monkeypatch.setattr(topics, "end_offsets", unanswered)
        monitor._look_out(0)
        monitor.tick()
        assert query(url, blind)[0][0].endswith("the broker does not answer: no broker")


def unanswered(*_: Any) -> dict[int, int]:
    raise BrokerUnavailable("no broker")


def test_a_canarys_labels_are_not_the_live_versions(url: str) -> None:
    write(url, losses((2000, 0.2)))
    write(url, losses((1000, 0.9)), version=2)
    with watching(url) as monitor:
        read_all(monitor)
        assert monitor._drift.num_fed == 2000
    assert query(url, "SELECT count(*) FROM innerloop.drift_alarms") == [(0,)]


HOURS = """SELECT topic, partition, hour, meta_version, kind, segment, num_labels, num_unknown,
    round(loss_adapted::numeric, 6), round(loss_start::numeric, 6), round(gain_squares::numeric, 5),
    round(ndcg_adapted::numeric, 6), round(ndcg_start::numeric, 6)
    FROM innerloop.prequential_by_hour ORDER BY 1, 2, 3, 4, 5, 6"""


def test_trimming_keeps_every_hours_figures_and_what_was_not_read(url: str) -> None:
    write(url, losses((2000, 0.2)))
    with watching(url) as monitor:
        read_all(monitor)
        write(url, losses((300, 0.2), seed=1))
        before = query(url, HOURS)
        assert {row[4] for row in before} == {"all", "support", "type", "new_item", "scene"}
        assert sum(row[6] for row in before if row[4] == "all") == 2300
        monitor._trimmed_at = -1e9
        monitor._trim()
    assert query(url, "SELECT count(*) FROM innerloop.prequential") == [(3,)]
    assert query(url, HOURS) == before


def test_a_day_of_the_record_is_kept_exactly_and_a_busy_monitor_trims_what_is_older(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(url, losses((600, 0.2)), batch=100)
    moved = (
        "UPDATE innerloop.prequential SET recorded_at = now() - interval '{}' WHERE first_offset {} 0 AND partition = 0"
    )
    query_write(database.owner_url, moved.format("23 hours 50 minutes", "="))
    query_write(database.owner_url, moved.format("24 hours 10 minutes", ">"))
    query_write(database.owner_url, "UPDATE innerloop.prequential SET recorded_at = now() WHERE partition = 1")
    with watching(url) as monitor:
        ticks = iter([300, 300, 0])

        def tick() -> int:
            read = next(ticks)
            if not read:
                monitor._stop.set()
            Monitor.tick(monitor)
            return read

        monkeypatch.setattr(monitor, "tick", tick)
        monkeypatch.setattr(monitor, "_watch_versions", lambda: None)
        monitor._watch()
    kept = query(url, "SELECT partition, first_offset FROM innerloop.prequential ORDER BY 1, 2")
    assert kept == [(0, 0), (1, 0), (1, 100), (1, 200)]


def test_a_writer_cannot_trim_by_hand(url: str) -> None:
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        query_write(url, "INSERT INTO innerloop.prequential_hours SELECT * FROM innerloop.prequential_hours")


def test_the_thresholds_are_the_settings() -> None:
    changed = monitoring.thresholds(Settings.load(drift_cool_down_hours=2.0, drift_days=3, drift_cost=7.0))
    assert (changed.cool_down_seconds, changed.days, changed.cost) == (7200.0, 3, 7.0)
    assert monitoring.thresholds(Settings.load()) == Thresholds()


def command(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "INNERLOOP_DATABASE_URL": url, "INNERLOOP_BROKER": "127.0.0.1:1"}
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "drift", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_commands_say_what_was_decided_and_draw_it(url: str, database: Database, tmp_path: Any) -> None:
    unwatched = command(database.reader_url, "status")
    assert (unwatched.returncode, "run `innerloop monitor`" in unwatched.stderr) == (1, True)
    write(url, losses((4000, 0.2), (3000, 0.5)))
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
    found = command(database.reader_url, "status", "--json")
    assert json.loads(found.stdout)["verdict"] == "retrain"
    with connect_engine(database.reader_url).connect() as connection:
        assert drift_status(connection, "interactions").as_line().startswith("watching, 0 events behind")
    told = command(database.reader_url, "explain", "--out", str(tmp_path / "drift.png"))
    assert told.returncode == 0, told.stderr
    assert "train again" in told.stdout
    assert "refit     saves 0.3000" in told.stdout
    assert "labels an hour" in told.stdout, "how much users do is reported"
    assert (tmp_path / "drift.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert command(database.reader_url, "explain", "--out", str(tmp_path / "drift.html")).returncode == 0
    page = (tmp_path / "drift.html").read_text()
    assert "data:image/png;base64,iVBOR" in page
    assert "refit     saves 0.3000" in page, "in words as well"


def test_an_operator_freezes_once_and_the_audit_knows(url: str) -> None:
    assert command(url, "freeze", "sale until Monday").returncode == 0
    assert command(url, "freeze", "again").returncode == 1
    assert command(url, "unfreeze").returncode == 0
    rows = query(url, "SELECT action, detail->>'reason' FROM innerloop.audit ORDER BY audit")
    assert rows == [("freeze", "sale until Monday"), ("unfreeze", "sale until Monday")]


def test_the_probe_reads_the_topic_and_the_live_version(database: Database, broker: Tansu, tmp_path: Any) -> None:
    items = [f"item-{number}" for number in range(60)]
    settings = Settings.load(
        database_url=database.writer_url, broker=broker.address, home=tmp_path, encoder="hashed", partitions=2
    )
    engine = connect_engine(database.writer_url)
    encoder = resolve_encoder("hashed", device="cpu")
    parameters = meta_parameters(items, text_dim=encoder.size, encoder=encoder.name)
    registry.register(engine, Artefacts(settings.artefacts_place()), parameters, metrics={}, provenance={})
    topics.ensure_topics(broker.address, {"interactions": {}, "items": {}, "erasures": {}}, 2)
    draw = np.random.default_rng(0)
    rows = [(f"u{draw.integers(80)}", items[int(draw.integers(60))]) for _ in range(1500)]

    def send(topic: str, lines: list[str], convert: Convert) -> None:
        (tmp_path / "lines.jsonl").write_text("\n".join(lines))
        with open_source(str(tmp_path / "lines.jsonl")) as source:
            feed(broker.address, topic, source, convert, pace=Pace())
        time.sleep(0.01)  # what comes next has a later Kafka time

    lines = [event(user, item, f"e{place}").decode() for place, (user, item) in enumerate(rows)]
    send("interactions", lines[:500], interaction_record)
    since = int(time.time() * 1000)
    send("interactions", lines[500:], interaction_record)
    window = since, since + 60_000
    gain = gain_of_refit(settings, window)
    assert np.isfinite(gain)
    assert gain != 0.0, "some event must have been judged under both"
    columns, recent = _positives(settings, window)
    assert (len(columns.users), recent) == (1500, 1000), "histories from before come along"
    columns, recent = _positives(settings, (since, since))
    assert (len(columns.users), recent) == (1000, 1000), "but not more of them than the window is long"
    wish = json.dumps({"v": 1, "user_id": "u7", "requested_at": int(time.time() * 1000)}).encode()
    send("erasures", ["{}"], lambda _: Outgoing(b"u7", wish, None))
    _, kept = _positives(settings, window)
    assert kept == 1000 - sum(user == "u7" for user, _ in rows[500:])
    with pytest.raises(NothingToLearn):
        _positives(settings, (window[1] + 60_000, window[1] + 70_000))


LATEST = "SELECT inputs->'circumstances' FROM innerloop.drift_decisions ORDER BY decision DESC LIMIT 1"


def test_what_the_adapters_take_off_the_loss_by_themselves_is_no_gain_of_a_refit(url: str) -> None:
    seen = losses((4000, 0.2), (3000, 0.5))
    seen.start[4000:] += 2.0  # the start has become worse by more: adaptation earns more than before
    with probing(url, 0.3, seen=seen) as monitor:
        read_all(monitor)
    verdict, reason = decisions(url)[-1]
    assert (verdict, "not worth it" in reason) == ("no", True), reason
    ((absorbed,),) = query(
        url, "SELECT inputs->'evidence'->'absorbed' FROM innerloop.drift_decisions ORDER BY decision DESC LIMIT 1"
    )
    assert absorbed > 0.3


def test_a_second_alarm_finds_what_the_first_led_to(url: str, database: Database) -> None:
    write(url, losses((4000, 0.2), (3000, 0.5)))
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
        assert decisions(url)[-1][0] == "retrain"
        query_write(  # it came to nothing
            database.owner_url,
            "UPDATE innerloop.retrain_requests SET status = 'failed', error = 'x', finished_at = now()",
        )
        write(url, losses((3000, 0.9), seed=1))
        read_all(monitor)
    verdict, reason = decisions(url)[-1]
    assert verdict == "wait"
    assert "cooling down (after 1 rejected in a row)" in reason
    ((now,),) = query(url, LATEST)
    assert (now["rejected"], now["retrained_today"], now["busy"]) == (1, 1, "")
    assert 0 < now["labels_since"] < 6000


@pytest.mark.parametrize(
    ("rows", "busy"),
    [
        ("INSERT INTO innerloop.retrain_requests (reason, window_from_ms, window_to_ms) VALUES ('x', 1, 2)",
         "request 1 is pending"),
        ("INSERT INTO innerloop.meta_versions (status, artefact, sha256, encoder, canary_partitions, canary_since) "
         "VALUES ('canary', 'y', 'y', 'test', '{0}', now())", "version 2 is a canary"),
    ],
)  # fmt: skip
def test_while_a_request_or_a_canary_is_under_way_nothing_else_is_asked_for(
    url: str, database: Database, rows: str, busy: str
) -> None:
    query_write(database.owner_url, rows)
    write(url, losses((4000, 0.2), (3000, 0.5)))
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
    assert decisions(url)[-1] == ("wait", busy)


def test_dead_letters_since_the_alarm_make_it_wait(url: str, database: Database) -> None:
    write(url, losses((4000, 0.2), (500, 0.5)))
    with watching(url, gain=0.3) as monitor:
        read_all(monitor)
        write(url, losses((2500, 0.5), seed=1))
        query_write(
            database.owner_url,
            "UPDATE innerloop.stream_position SET next_offset = next_offset + 20, dead_lettered = 20",
        )
        read_all(monitor)
    assert "of the events are dead letters" in decisions(url)[-1][1]


@contextmanager
def probing(url: str, *answers: float | Exception, seen: Observations | None = None) -> Iterator[Monitor]:
    """A monitor whose probe gives or raises these one after the other."""
    left = list(answers)

    def probe(_: tuple[int, int]) -> float:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    write(url, seen or losses((4000, 0.2), (3000, 0.5)))
    with watching(url) as monitor:
        del monitor._cases._beyond
        monitor._cases._gain_of = probe
        yield monitor
    assert not left


def test_a_probe_that_finds_no_broker_or_artefact_store_is_asked_again(url: str) -> None:
    with probing(url, BrokerUnavailable("no broker"), OSError("no route"), 0.3) as monitor:
        read_all(monitor)
    assert decisions(url)[-1][0] == "retrain"


def test_a_probe_that_fails_by_a_fault_of_ours_ends_the_monitor(url: str) -> None:
    with probing(url, ValueError("a wrong shape")) as monitor, pytest.raises(ValueError, match="a wrong shape"):
        read_all(monitor)
    assert decisions(url)[-1][0] == "wait", "the restart finds the case where it was"


def test_a_case_begins_at_the_label_of_its_alarm_however_the_record_is_cut(url: str, database: Database) -> None:
    seen = losses((4000, 0.2), (3000, 0.5))
    found = []
    for batch in (37, 500):
        write(url, seen, partitions=1, batch=batch)
        with watching(url, gain=0.3) as monitor:
            read_all(monitor)
        ((alarm_ms, evidence),) = query(
            url,
            "SELECT inputs->'alarm_ms', inputs->'evidence' FROM innerloop.drift_decisions WHERE verdict = 'retrain'",
        )
        ((label,),) = query(url, "SELECT label FROM innerloop.drift_alarms WHERE worse ORDER BY alarm LIMIT 1")
        assert alarm_ms == seen.event_ms[label], "the record's times are its events' here"
        found.append((alarm_ms, evidence))
        for table in (
            "retrain_requests", "drift_decisions", "drift_alarms", "drift_state", "drift_positions", "prequential",
            "stream_position",
        ):  # fmt: skip
            query_write(database.owner_url, f"DELETE FROM innerloop.{table}")  # noqa: S608 - these names
    assert found[0] == found[1]
