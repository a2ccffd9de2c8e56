"""Searches go on where they stopped, and their best recipe is what training takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.item_fitting import Matrix, part_matrices, similarity_scale
from models.recipe import DEFAULT, Recipe
from pipeline.backtest_search import SearchUnavailable
from pipeline.cli import app
from pipeline.meta_training import recipe_named
from pipeline.recipes import RecipeUnknown
from pipeline.settings import Settings
from pipeline.synthetic import Plan
from pipeline.synthetic_files import write_synthetic
from schemas.errors import ConfigurationError
from tests.test_peers import SEQUENCES, interactions


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INNERLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("INNERLOOP_ENCODER", "hashed")
    return tmp_path


def search(data: Path, trials: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    app(["search", str(data), "--name", "shop", "--trials", str(trials), "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_search_goes_on_where_it_stopped_and_never_keeps_less_than_the_defaults(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # users come one after the other, so that some are there to validate on
    data = write_synthetic(Plan(users=150, items=40, choices=2500, activity=0.3), home / "data")[0]
    first = search(data, 2, capsys)
    assert first["trials"] == 2
    again = search(data, 4, capsys)
    assert again["trials"] == 4
    assert again["default_figure"] == first["default_figure"], "the first trial are the defaults, once"
    assert again["figure"] >= first["figure"] >= first["default_figure"] > 0
    assert search(data, 3, capsys) == again, "nothing to do"
    assert recipe_named(Settings.load(), "shop").values() == again["recipe"]
    other = write_synthetic(Plan(users=100, items=40, choices=1500, seed=1), home / "other")[0]
    with pytest.raises(SearchUnavailable, match="--name"):
        search(other, 5, capsys)


def test_a_recipe_that_is_not_there_or_means_nothing_is_refused(home: Path) -> None:
    settings = Settings.load()
    assert recipe_named(settings, None) == DEFAULT
    with pytest.raises(RecipeUnknown, match="innerloop search"):
        recipe_named(settings, "none")
    with pytest.raises(RecipeUnknown, match="no name"):
        recipe_named(settings, "../../etc/passwd")
    for text, said in (
        ("ease_decay = 3", "within"),
        ("speed = 1", "unknown entry 'speed'"),
        ('als_alpha = "x"', "number"),
    ):
        (home / "mine.toml").write_text(text)
        with pytest.raises(ConfigurationError, match=said):
            recipe_named(settings, str(home / "mine.toml"))


def test_a_recipe_reaches_the_tables() -> None:
    events = interactions(SEQUENCES)
    usual = part_matrices(events)
    changed = part_matrices(events, Recipe(cosine_shrink=1.0, next20_shrink=1.0, next8_shrink=1.0, ease_ridge=10.0))
    assert all(not torch.equal(one, other) for one, other in zip(usual, changed, strict=True))
    gram = Matrix.of(events).gram()
    expected = gram[0, 1] / (similarity_scale(gram[0, 0], gram[1, 1]) + 1.0)
    assert changed[0][0, 1] == pytest.approx(float(expected))
