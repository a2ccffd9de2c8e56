"""Careers of versions: who may go where, one at a time, and what the watch does with canaries and new live ones."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg2
import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from models.checkpoint import ArtefactRefused
from pipeline import drift_reading, promotion, registry, versions
from pipeline.artefacts import ArtefactMissing, Artefacts
from pipeline.cli import app
from pipeline.judgement import Rules
from pipeline.promotion import Watched
from pipeline.versions import Change, NotPossible
from schemas.database import connect_engine
from tests.conftest import Database
from tests.factories import meta_parameters

WHY = Change("test", "because")
RULES = Rules(canary_events=400)


@pytest.fixture
def on(database: Database, tmp_path: Path) -> Iterator[Watched]:
    """Three versions, the first live, and four partitions."""
    engine = connect_engine(database.writer_url)
    artefacts = Artefacts(tmp_path / "artefacts")
    for seed in range(3):
        registry.register(engine, artefacts, meta_parameters(["a", "b"], seed=seed), metrics={}, provenance={})
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO innerloop.stream_position (topic, partition, first_offset, next_offset) "
                "SELECT 'interactions', n, 0, 0 FROM generate_series(0, 3) AS n"
            )
        )
    yield Watched(engine, artefacts, "interactions")
    engine.dispose()


def statuses(on: Watched) -> dict[int, str]:
    return {version.version: version.status for version in versions.listed(on.engine)}


def damage(on: Watched, version: int, how: str) -> None:
    sha256 = versions.shown(on.engine, version).sha256
    if how == "gone":
        on.artefacts.remove(sha256)
        return
    path = Path(on.artefacts.place(sha256))
    path.write_bytes({"cut": path.read_bytes()[:100], "pickle": b"\x80\x04K\x01."}[how])


# --- careers ------------------------------------------------------------------------------------------------------


def test_a_challenger_becomes_a_canary_then_live_and_can_be_taken_back(on: Watched) -> None:
    partitions = promotion.begin_canary(on, 2, 0.5, WHY, {"gain": [0.1, 0.05, 0.15]})
    assert len(partitions) == 2
    assert statuses(on) == {1: "live", 2: "canary", 3: "challenger"}
    assert promotion.go_live(on, 2, WHY, only_from="canary") == 1
    assert statuses(on) == {1: "retired", 2: "live", 3: "challenger"}
    assert versions.before(on.engine) == 1
    assert promotion.return_to(on, 1, WHY) == 2
    assert statuses(on) == {1: "live", 2: "rejected", 3: "challenger"}
    done = [(row["subject"], row["action"]) for row in versions.history(on.engine)]
    assert done[::-1] == [
        ("version 2", "canary"), ("version 1", "retire"), ("version 2", "promote"), ("version 2", "roll_back"),
        ("version 1", "restore"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda on: promotion.go_live(on, 1, WHY), "version 1 is live: it cannot go live"),
        (lambda on: promotion.go_live(on, 9, WHY), "there is no version 9"),
        (lambda on: promotion.go_live(on, 2, WHY, only_from="canary"), "version 2 is challenger"),
        (lambda on: promotion.return_to(on, 2, WHY), "version 2 is challenger: it cannot be rolled back to"),
        (lambda on: promotion.begin_canary(on, 1, 0.1, WHY, {}), "version 1 is live: it cannot become a canary"),
        (lambda on: versions.reject(on.engine, 1, WHY), "version 1 is live: it cannot be rejected"),
        (lambda on: versions.before(on.engine), "nothing to roll back to"),
    ],
)
def test_a_step_that_the_statuses_forbid_changes_nothing(on: Watched, step: object, said: str) -> None:
    before = statuses(on)
    with pytest.raises(NotPossible, match=said):
        step(on)  # type: ignore[operator]
    assert statuses(on) == before
    assert versions.history(on.engine) == []


def test_a_second_canary_is_refused(on: Watched) -> None:
    promotion.begin_canary(on, 2, 0.1, WHY, {})
    with pytest.raises(NotPossible, match="version 3 is challenger: it cannot become a canary beside version 2"):
        promotion.begin_canary(on, 3, 0.1, WHY, {})


@pytest.mark.parametrize("how", ["gone", "cut", "pickle"])
def test_a_version_whose_artefact_is_gone_or_damaged_is_neither_promoted_nor_returned_to(on: Watched, how: str) -> None:
    damage(on, 2, how)
    for step in (promotion.go_live, lambda *a: promotion.begin_canary(on, 2, 0.1, WHY, {})):
        with pytest.raises((ArtefactMissing, ArtefactRefused)):
            step(on, 2, WHY)
    promotion.go_live(on, 3, WHY)
    damage(on, 1, how)
    with pytest.raises((ArtefactMissing, ArtefactRefused)):
        promotion.return_to(on, 1, WHY)
    assert statuses(on) == {1: "retired", 2: "challenger", 3: "live"}


def test_promotions_at_the_same_time_come_one_after_the_other(on: Watched) -> None:
    barrier = threading.Barrier(4)
    failures: list[Exception] = []

    def race(step: int) -> None:
        barrier.wait()
        for _ in range(5):
            try:
                if step < 2:
                    promotion.go_live(on, 2 + step, WHY)
                else:
                    promotion.return_to(on, versions.before(on.engine), WHY)
            except NotPossible:
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the test must tell
                failures.append(error)

    racers = [threading.Thread(target=race, args=(step,)) for step in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert failures == []
    assert sorted(statuses(on).values()).count("live") == 1
    told = [row["action"] for row in versions.history(on.engine)]
    assert told.count("promote") + told.count("restore") == told.count("retire") + told.count("roll_back")


# --- the watch ----------------------------------------------------------------------------------------------------


def now() -> datetime:
    """The database's clock says when a canary began, so a suite that runs for minutes cannot have a fixed time."""
    return datetime.now(UTC)


def predict(
    on: Watched, partitions: list[int], version: int, loss: float, *, minutes: float, events: int = 300
) -> None:
    """Rows of the record, recorded so many minutes after now."""
    draw = np.random.default_rng(round(100 * loss) + version)
    with closing(psycopg2.connect(on.engine.url.render_as_string(hide_password=False).replace("+psycopg2", ""))) as c:
        for partition in partitions:
            users = [f"u{partition}-{number}" for number in draw.integers(100, size=events)]
            losses = (loss + draw.normal(size=events)).clip(0, 20).tolist()
            ranks = draw.integers(1, 1000, size=events).tolist()
            with c.cursor() as cursor:
                cursor.execute(
                    """INSERT INTO innerloop.prequential (topic, partition, first_offset, next_offset, recorded_at,
                    meta_version, offsets, record_times, user_ids, item_nos, types, num_events, loss_adapted,
                    loss_start, rank_adapted, rank_start, rank_popular, event_times, new_items, scenes)
                    SELECT 'interactions', %s, n, n + %s, %s, %s, o, o, %s, %s, %s, %s, %s, %s, %s, %s, %s, o,
                    array_fill(false, ARRAY[%s]), %s FROM (SELECT coalesce(max(next_offset), 0) AS n
                    FROM innerloop.prequential WHERE partition = %s) AS p,
                    LATERAL (SELECT array_agg(g) AS o FROM generate_series(n, n + %s - 1) AS g) AS q""",
                    (partition, events, now() + timedelta(minutes=minutes), version, users, [1] * events, [2] * events,
                     [3] * events, losses, losses, ranks, ranks, ranks, events, [0] * events, partition, events),
                )  # fmt: skip
        c.commit()


def tick(on: Watched, *, hours: float = 0.1) -> list[str]:
    return promotion.watch(on, RULES, now=now() + timedelta(hours=hours))


def on_trial(on: Watched) -> tuple[list[int], list[int]]:
    """Version 2 as a canary, after a day of version 1 everywhere."""
    predict(on, [0, 1, 2, 3], 1, 5.0, minutes=-30)
    mine = promotion.begin_canary(on, 2, 0.5, WHY, {})
    return mine, [partition for partition in range(4) if partition not in mine]


def test_a_canary_that_does_worse_is_taken_back_by_the_next_tick(on: Watched) -> None:
    mine, others = on_trial(on)
    assert tick(on) == []
    predict(on, mine, 2, 6.0, minutes=1)
    predict(on, others, 1, 5.0, minutes=1)
    assert tick(on)[0].startswith("canary 2 is taken back: worse than expected")
    assert statuses(on) == {1: "live", 2: "rejected", 3: "challenger"}
    assert versions.shown(on.engine, 2).judgement["canary"]["excess"][0] > 0.5
    assert tick(on) == []


def test_a_canary_that_does_as_well_goes_live_and_stays_when_its_later_losses_are_as_before(on: Watched) -> None:
    mine, others = on_trial(on)
    predict(on, mine, 2, 5.5, minutes=1)
    predict(on, others, 1, 5.5, minutes=1)  # everybody's losses rose
    assert tick(on)[0].startswith("version 2 is live in place of 1")
    assert statuses(on) == {1: "retired", 2: "live", 3: "challenger"}
    with on.engine.begin() as connection:  # the trial's rows are of the minute before
        connection.execute(
            text("UPDATE innerloop.meta_versions SET live_since = :at WHERE version = 2"),
            {"at": now() + timedelta(minutes=2)},
        )
    predict(on, [0, 1, 2, 3], 2, 5.2, minutes=3)
    assert tick(on)[0].startswith("version 2 stays live: as good as expected")
    predict(on, [0, 1, 2, 3], 2, 9.0, minutes=5)
    assert tick(on) == [], "from here on it is the drift monitor's business"


def test_frozen_a_good_canary_waits_and_a_bad_one_is_taken_back(on: Watched) -> None:
    drift_reading.freeze(on.engine, "sale", "test")
    mine, others = on_trial(on)
    predict(on, mine, 2, 5.0, minutes=1)
    predict(on, others, 1, 5.0, minutes=1)
    assert tick(on, hours=25) == [], "and its time does not run out"
    assert statuses(on)[2] == "canary"
    predict(on, mine, 2, 9.0, minutes=2)
    assert tick(on)[0].startswith("canary 2 is taken back")


def test_unfrozen_a_good_canary_goes_live(on: Watched) -> None:
    drift_reading.freeze(on.engine, "sale", "test")
    mine, others = on_trial(on)
    predict(on, mine, 2, 5.0, minutes=1)
    predict(on, others, 1, 5.0, minutes=1)
    assert tick(on) == []
    drift_reading.unfreeze(on.engine, "test")
    assert tick(on)[0].startswith("version 2 is live")


def test_a_live_version_that_does_worse_than_what_it_replaced_is_rolled_back(on: Watched) -> None:
    predict(on, [0, 1, 2, 3], 1, 5.0, minutes=-30)
    promotion.go_live(on, 2, WHY)
    predict(on, [0, 1, 2, 3], 2, 6.0, minutes=1)
    assert tick(on)[0].startswith("version 2 is rolled back to 1")
    assert statuses(on) == {1: "live", 2: "rejected", 3: "challenger"}
    assert tick(on) == []


def test_a_version_that_goes_live_again_is_watched_again(on: Watched) -> None:
    predict(on, [0, 1, 2, 3], 1, 5.0, minutes=-30)
    promotion.go_live(on, 2, WHY)
    predict(on, [0, 1, 2, 3], 2, 5.0, minutes=1)
    assert tick(on)[0].startswith("version 2 stays live")
    promotion.go_live(on, 3, WHY)
    predict(on, [0, 1, 2, 3], 3, 5.0, minutes=-1)  # before the next step, a moment ago
    promotion.go_live(on, 2, WHY)
    predict(on, [0, 1, 2, 3], 2, 6.0, minutes=2)
    assert tick(on)[0].startswith("version 2 is rolled back to 3")


def test_a_live_version_that_does_worse_stays_when_there_is_nothing_to_return_to(on: Watched) -> None:
    predict(on, [0, 1, 2, 3], 1, 5.0, minutes=-30)
    promotion.go_live(on, 2, WHY)
    damage(on, 1, "gone")
    predict(on, [0, 1, 2, 3], 2, 6.0, minutes=1)
    assert "cannot be returned to" in tick(on)[0]
    assert statuses(on)[2] == "live"
    assert tick(on) == [], "said once"


@pytest.mark.parametrize("status", ["canary", "live"])
def test_a_version_that_a_worker_refused_is_taken_back(on: Watched, status: str) -> None:
    if status == "canary":
        promotion.begin_canary(on, 2, 0.1, WHY, {})
    else:
        promotion.go_live(on, 2, WHY)
    with on.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO innerloop.audit (actor, action, subject, detail) "
                """VALUES ('worker', 'refuse', 'version 2', '{"reason": "HASH_MISMATCH: x"}')"""
            )
        )
    assert "a worker could not load it: HASH_MISMATCH" in tick(on)[0]
    assert statuses(on) == {1: "live", 2: "rejected", 3: "challenger"}


def test_a_canary_that_proves_nothing_within_its_time_is_taken_back(on: Watched) -> None:
    on_trial(on)
    assert tick(on, hours=23) == []
    assert "no verdict within 24 h" in tick(on, hours=25)[0]


# --- commands -----------------------------------------------------------------------------------------------------


def test_the_commands_list_show_promote_and_roll_back(
    on: Watched, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INNERLOOP_BROKER", "nowhere:1")
    monkeypatch.setenv("INNERLOOP_HOME", str(tmp_path))

    def run(*words: str, role: str = "writer") -> str:
        monkeypatch.setenv("INNERLOOP_DATABASE_URL", getattr(database, f"{role}_url"))
        result = CliRunner().invoke(app, ["models", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert run("promote", "2", "--canary", "--why", "to see").startswith("version 2 is a canary on partition ")
    assert run("promote", "2", "--why", "it is better") == "version 2 is live in place of 1\n"
    with on.engine.begin() as connection:
        connection.execute(text("UPDATE innerloop.meta_versions SET window_from_ms = 1704067200000 WHERE version = 2"))
    shown = run("show", "2", role="reader")
    assert "to see" in shown
    assert re.search(r"window_from \(UTC\) +2024-01-01 00:00\n", shown)
    assert run("rollback", "--why", "complaints") == "version 1 is live again, 2 is rejected\n"
    table = run("list", role="reader").splitlines()
    assert [line.split()[:2] for line in table[1:]] == [["3", "challenger"], ["2", "rejected"], ["1", "live"]]
    assert "complaints" in table[2]
    assert table[2].rstrip().endswith(": it is better"), "who made it live, and why, is kept after its time"
    assert '"action": "roll_back"' in run("show", "2", "--json", role="reader")
