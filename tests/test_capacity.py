"""`innerloop bench`: the worker's own code over drawn clicks, beside the live version; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from pipeline import registry
from pipeline.artefacts import Artefacts
from pipeline.cli import app
from pipeline.settings import Settings
from pipeline.synthetic import user_id
from pipeline.worker_capacity import draw
from schemas.events import Interaction, parse_interaction
from tests.conftest import Database
from tests.factories import meta_parameters

ITEMS = [f"item-{number}" for number in range(30)]


def test_drawn_clicks_are_events_and_the_same_for_a_seed() -> None:
    parameters = meta_parameters(ITEMS)
    records = draw(parameters, 2000, 50, seed=3)
    events = [parse_interaction(key, value, 1_790_000_000_000) for key, value in records]
    assert all(isinstance(event, Interaction) for event in events)
    assert len({event.event_id for event in events if isinstance(event, Interaction)}) == 2000
    assert records == draw(parameters, 2000, 50, seed=3) != draw(parameters, 2000, 50, seed=4)
    drawn = np.bincount([parameters.item_ids.index(event.item_id) for event in events], minlength=30)  # type: ignore[union-attr]
    assert np.corrcoef(drawn, parameters.counts.sum(0).numpy())[0, 1] > 0.7
    first, last = (sum(event.user_id == user for event in events) for user in (user_id(0), user_id(49)))  # type: ignore[union-attr]
    assert first > 10 * last


def test_every_size_is_measured_with_a_readers_login_and_nothing_is_written(
    database: Database, writer: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"BROKER": "nowhere:1", "HOME": str(tmp_path), "ENCODER": "hashed:16"}.items():
        monkeypatch.setenv(f"INNERLOOP_{name}", value)
    monkeypatch.setenv("INNERLOOP_DATABASE_URL", database.reader_url)
    words = ["bench", "--events", "300", "--users", "20", "--batch", "10", "--batch", "100", "--json"]
    assert CliRunner().invoke(app, words).exception is not None  # there is no version yet
    parameters = meta_parameters(ITEMS, encoder="hashed-bag-of-words-1:16")
    registry.register(writer, Artefacts(Settings.load().artefacts_place()), parameters, metrics={}, provenance={})
    with writer.begin() as connection:
        connection.execute(text("INSERT INTO innerloop.catalogue_snapshots DEFAULT VALUES"))
        connection.execute(
            text("INSERT INTO innerloop.items (item_id, text, snapshot) VALUES (:id, :id, 1)"),
            [{"id": i} for i in ITEMS],
        )
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert [one["batch_events"] for one in found["capacity"]] == [10, 100]
    assert all(one["cpu_us"] * one["events_per_second"] == pytest.approx(1e6) for one in found["capacity"])
    assert (found["version"], found["items"], found["recommend_ms"]) == (1, 30, {})
    assert "batches of 100: 300 of 300" in result.stderr
    with writer.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM innerloop.user_state")) == 0
