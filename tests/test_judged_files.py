"""The judged files of the repository: unchanged, what the judges said of them, and what README says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.figures import Interval
from pipeline import backtest_figures
from pipeline.backtest_figures import METRICS, event_metrics
from pipeline.backtest_static import DRAWS, SEED, judge_scores
from pipeline.interaction_log import InteractionLog
from pipeline.protocols import NUM_HEAD, NUM_QUERY, SHOTS, Query, cut_static
from pipeline.settings import Settings
from tests.benchmarks.judged_files import JUDGED, described, masks_of, movielens, small_static, small_stream

INDEX = json.loads((JUDGED / "index.json").read_text())
README = (Path(__file__).parents[1] / "README.md").read_text()
LOG = (JUDGED.parents[1] / "LOG.md").read_text()
STREAM = [name for name in INDEX if name.startswith("stream")]
STATIC = [name for name in INDEX if name.startswith("static")]


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    return movielens(Settings.load().home)


@pytest.mark.parametrize("name", INDEX)
def test_a_judged_file_is_the_one_that_was_judged_and_says_by_which_command(name: str) -> None:
    assert described(JUDGED / f"{name}.npz") == INDEX[name]["kept"]
    assert INDEX[name]["command"].startswith("innerloop backtest ml-100k ")
    assert f"--referee-scores {name}.npz" in INDEX[name]["command"]
    assert {path.stem for path in JUDGED.glob("*.npz")} == {path.stem for path in JUDGED.glob("*.txt")} == set(INDEX)


def stream_figures(name: str) -> dict[str, Interval]:
    columns = np.load(JUDGED / f"{name}.npz")
    mask = columns["unseen"]
    ranks = np.maximum(columns["ranks10"][mask].astype(np.float32), 0)
    ranks[:, 0] = columns["rank"][mask]
    return backtest_figures.row("all", event_metrics(ranks), columns["user"][mask].astype(np.int64)).metrics


def plain(interval: Interval) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


@pytest.mark.parametrize("name", STREAM)
def test_our_figures_of_a_judged_stream_are_the_judges(name: str) -> None:
    judged = next(line for line in (JUDGED / f"{name}.txt").read_text().splitlines() if line.startswith("| all |"))
    ours = stream_figures(name)
    assert judged.split(" | ")[2:] == [*(plain(ours[metric]) for metric in METRICS[:-1]), f"{plain(ours['mrr'])} |"]


@pytest.mark.parametrize("name", STATIC)
def test_our_figures_of_judged_episodes_are_the_judges(name: str, log: InteractionLog) -> None:
    columns = np.load(JUDGED / f"{name}.npz")
    query: Query = "adjacent" if "adjacent" in name else "gap"
    cut = cut_static(log)
    place = np.argsort(np.argsort([int(item_id) for item_id in log.item_ids]))
    ours: list[list[str]] = [[], []]
    for shots, masks in masks_of(log, cut, query).items():
        first = shots if query == "adjacent" else NUM_HEAD
        wanted = [place[log.items[history[first : first + NUM_QUERY]]] for history in cut.histories]
        metrics = judge_scores(columns[f"k{shots}"], zip(masks, wanted, strict=True))
        for cells, found in zip(ours, backtest_figures.bootstrap(metrics, draws=DRAWS, seed=SEED), strict=True):
            cells.append("{:.3f} [{:.3f},{:.3f}]".format(*found))
    lines = [line for line in (JUDGED / f"{name}.txt").read_text().splitlines() if line.startswith("yours")]
    assert [re.split(r" {3,}", line.removeprefix("yours").strip()) for line in lines] == ours


def test_the_readmes_and_the_logs_figures_are_of_the_judged_files() -> None:
    figures = {name: stream_figures(name) for name in STREAM}
    first = figures["stream_test_seed0"]
    assert all(shown(first[metric]) in README for metric in ("set_ndcg", "ndcg"))
    seeds = [figures[f"stream_test_seed{seed}"] for seed in range(3)]  # README has one of them, the log all
    for metric in ("set_ndcg", "ndcg"):
        assert " / ".join(f".{digits(seed[metric].mean)}" for seed in seeds) in LOG
    for name in STATIC:
        judged = (JUDGED / f"{name}.txt").read_text().splitlines()
        means = re.findall(r"0(\.\d+) \[", next(line for line in judged if line.startswith("yours")))
        assert " / ".join(means) in README


def digits(value: float) -> str:
    return f"{value:.3f}".removeprefix("0.")


def shown(interval: Interval) -> str:
    return ".{} [.{}, .{}]".format(*map(digits, interval))


def test_small_files_keep_what_decides_the_figures() -> None:
    draw = np.random.default_rng(3)
    ranks = draw.integers(1, 40, (30, 10)).astype(np.float32)
    ranks[-3:, 4:] = -1
    whole: dict[str, NDArray[Any]] = {name: ranks for name in ("ranks10", "ranks10_start")} | {"rank": ranks[:, 0]}
    whole |= {name: draw.integers(0, 5, 30) for name in ("user", "K", "unseen")}
    small = small_stream(whole)
    for name in ("ranks10", "ranks10_start"):
        before, after = (event_metrics(np.maximum(one[name], 0).astype(np.float32)) for one in (whole, small))
        assert np.array_equal(before[:, :4], after[:, :4])
    assert np.array_equal(small["ranks10_start"][:, 0], ranks[:, 0])
    scores = {f"k{shots}": draw.normal(size=(4, 50)).round(1) for shots in SHOTS}
    masks = {shots: [draw.permutation(50)[:5] for _ in range(4)] for shots in SHOTS}
    kept = small_static(scores, masks)
    for shots in SHOTS:
        queries = [(masked, draw.permutation(50)[:8]) for masked in masks[shots]]
        before, after = (judge_scores(one[f"k{shots}"].astype(np.float32), queries) for one in (scores, kept))
        assert np.array_equal(before, after)
