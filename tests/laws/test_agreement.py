"""Workers of one database whose settings differ: the second is refused, for as long as the first runs."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from pipeline import agreement
from pipeline.agreement import Agreement, SettingsDiffer, deciding, fingerprint
from pipeline.session import StoreUnavailable
from pipeline.settings import Settings
from schemas.database import connect_engine
from tests.brokers import Tansu
from tests.conftest import Database, Postgres
from tests.laws.harness import CONFIGURATION, OK, Deploy

MINE, OTHER = {"top_n": 50, "encoder": "hashed"}, {"top_n": 20, "encoder": "hashed"}


@pytest.fixture
def engine(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(agreement, "LETTING_GO_SECONDS", 0.0)
    engine = connect_engine(database.writer_url)
    yield engine
    engine.dispose()


def test_the_same_settings_agree_and_others_are_named_and_refused_while_the_first_runs(engine: Engine) -> None:
    first, same, other = Agreement(engine, MINE), Agreement(engine, MINE), Agreement(engine, OTHER)
    first.hold()
    same.hold()
    first.hold()
    with pytest.raises(SettingsDiffer, match="INNERLOOP_TOP_N: 50 there, 20 here") as refused:
        other.hold()
    assert "ENCODER" not in str(refused.value)
    first.close()
    with pytest.raises(SettingsDiffer):
        other.hold()
    same.close()
    other.hold()
    with pytest.raises(SettingsDiffer):
        first.hold()
    other.close()


def test_who_has_lost_the_connection_holds_again_or_is_refused(engine: Engine, services: Postgres) -> None:
    first, other = Agreement(engine, MINE), Agreement(engine, OTHER)
    first.hold()
    services.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'innerloop'")
    with pytest.raises(StoreUnavailable):
        first.hold()
    first.hold()
    with pytest.raises(SettingsDiffer):
        other.hold()
    services.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'innerloop'")
    other.close()
    other.hold()
    with pytest.raises(StoreUnavailable):
        first.hold()
    with pytest.raises(SettingsDiffer):
        first.hold()
    other.close()


def test_databases_of_one_server_do_not_hinder_each_other(engine: Engine, twin: Database) -> None:
    elsewhere = connect_engine(twin.writer_url)
    first, other = Agreement(engine, MINE), Agreement(elsewhere, OTHER)
    first.hold()
    other.hold()
    first.close()
    other.close()
    elsewhere.dispose()


def test_what_decides_is_compared_and_what_does_not_is_not(tmp_path: pathlib.Path) -> None:
    mapping = tmp_path / "mapping.toml"
    mapping.write_text("[fields]")

    def mark(**changes: object) -> int:
        settings = Settings.load(mapping=mapping, **changes)
        return fingerprint(deciding(settings.shown(), settings.mapping))

    usual = mark()
    assert mark(cache_users=7, batch_events=7, database_url="postgresql://a:b@c/d", device="cuda") == usual
    changes: list[dict[str, object]] = [
        {"top_n": 7}, {"group": "another"}, {"recommend_seen": True}, {"user_events_per_minute": 7},
        {"event_types": {"view": {"label": 1, "weight": 2}}},
    ]  # fmt: skip
    assert len({usual, *(mark(**change) for change in changes)}) == 1 + len(changes)
    mapping.write_text("[types]")
    assert mark() != usual


def test_a_worker_whose_settings_differ_from_one_that_runs_ends_with_78_and_says_which(
    broker: Tansu, deploy: Deploy
) -> None:
    deployment = deploy(broker.address)
    with deployment.worker("first") as first:
        first.wait_until_ready()
        with deployment.worker("second", top_n=7) as second:
            assert second.wait() == CONFIGURATION, second.log
            assert "INNERLOOP_TOP_N: 50 there, 7 here" in second.log
        with deployment.worker("third", cache_users=900) as third:
            third.wait_until_ready()
        assert first.code is None
    with deployment.worker("fourth", top_n=7) as fourth:
        fourth.wait_until_ready()
        assert fourth.code in {None, OK}
