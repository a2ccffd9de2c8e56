"""A backtest from file to figures: both protocols, on small data whose truth is known."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.figures import Interval
from pipeline import backtest_figures as figures
from pipeline import backtest_peers
from pipeline.backtest import limited_cases
from pipeline.backtest_static import judge_scores
from pipeline.cli import app
from pipeline.interaction_log import InteractionLog
from pipeline.protocols import cut_static
from pipeline.synthetic import Plan
from pipeline.synthetic_files import write_synthetic

PLAN = Plan(users=150, items=60, choices=6000, activity=0.3, sharpness=4.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_synthetic(PLAN, tmp_path_factory.mktemp("data"))


def backtest(*arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("INNERLOOP_ENCODER", "hashed")
    app(["backtest", *map(str, arguments), "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_stream_is_judged_and_the_referees_file_agrees_with_the_figures(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.npz"
    report, logs = tmp_path / "report", tmp_path / "logs"
    arguments = (data[0], "--items", data[1], "--peers", "popular,item-knn", "--referee-scores", scores)
    written_too = ("--out", report, "--tensorboard", logs)
    found = backtest(*arguments, *written_too, capsys=capsys, monkeypatch=monkeypatch)
    page = (report / "report.html").read_text()
    assert found["headline"][0] in page, "words first"
    assert page.count("<svg") == 4
    drawn = page[page.index("<svg") :]
    assert "var(--ink)" in drawn
    assert not re.search('#[0-9a-f]{6}[;"]', drawn), "plots take the page's colours, light or dark"
    assert not any(word in page for word in ("<script", "<link", "src=", "@import")), "nothing is loaded from elsewhere"
    assert json.loads((report / "report.json").read_text()) == found
    assert {path.name for path in logs.iterdir()} == set(found["overall"])
    assert set(found["overall"]) == {"adapted", "start", "popular", "item-knn"}
    assert found["overall"]["adapted"]["set_ndcg"][0] > found["overall"]["popular"]["set_ndcg"][0] > 0
    assert found["headline"]
    assert found["calibration"]
    assert 0 < found["lists"]["adapted"]["coverage"] <= 1
    written = np.load(scores)
    unseen, ranks = written["unseen"], written["ranks10"]
    assert (written["rank"] == ranks[:, 0]).all()
    expected = slow_set_ndcg(ranks[unseen])
    users = written["user"][unseen]
    mean = np.mean([expected[users == user].mean() for user in np.unique(users)])
    assert found["overall"]["adapted"]["set_ndcg"][0] == pytest.approx(mean, abs=1e-6)


def slow_set_ndcg(ranks: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = []
    for row in ranks:
        present = row[row > 0]
        ideal = sum(1 / np.log2(2 + place) for place in range(min(10, len(present))))
        rows.append(sum(1 / np.log2(1 + rank) for rank in present if rank <= 10) / ideal)
    return np.array(rows)


def test_static_episodes_are_judged_and_users_do_not_learn_from_each_other(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = tmp_path / "scores.npz"
    arguments = ("--items", data[1], "--protocol", "static", "--peers", "popular,item-knn", "--referee-scores", scores)
    found = backtest(data[0], *arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert set(found["by_k"]["adapted"]) == {"1", "3", "5", "10", "20"}
    assert found["by_k"]["popular"]["1"] == found["by_k"]["popular"]["20"], "the same list, the same query"
    assert any("inner step is off" in line for line in found["headline"]) == (not found["inner_step"])
    assert np.load(scores)["k3"].shape == (found["cases"], found["items"])
    assert found["by_k"]["adapted"]["20"]["ndcg"][0] > found["by_k"]["popular"]["20"]["ndcg"][0]


def test_static_episodes_of_some_users_are_those_that_all_users_have_and_the_report_says_so() -> None:
    log = log_of([(user, at) for user in range(200) for at in range(30)])
    whole = cut_static(log)
    some, notes = limited_cases(log, whole, 7)
    kept = np.flatnonzero(np.isin(whole.users, some.users))
    assert len(some.users) == 7
    assert [history.tolist() for history in some.histories] == [whole.histories[case].tolist() for case in kept]
    assert (some.fit == whole.fit).all()
    assert f"7 of {len(whole.users)} users" in notes[0]
    assert limited_cases(log, whole, len(whole.users)) == (whole, [])


def log_of(pairs: list[tuple[int, int]]) -> InteractionLog:
    """Users, each with events one after the other, every user later than the one before."""
    users, places = np.array(pairs).T
    nothing = np.zeros(len(users), np.int64)
    ids = tuple(str(user) for user in np.unique(users))
    items, times, weights = places % 5, 1000 * users + places, np.ones(len(users), np.float32)
    names: tuple[str | None, ...] = (None,) * 5
    return InteractionLog(
        ids, tuple("abcde"), names, users, items, times, nothing, weights > 0, weights, 1.0, Counter()
    )


def test_a_file_without_texts_and_without_types_can_be_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(1)
    # users come one after the other, as in life: the last fifth begins late
    rows = [f"{at // 25 + draw.integers(3)},{draw.integers(12)},{1_600_000_000 + at}" for at in range(1500)]
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join(["user,item,time", *rows]))
    found = backtest(path, "--peers", "popular", "--judged-users", 5, capsys=capsys, monkeypatch=monkeypatch)
    assert any("every event is a click" in note for note in found["notes"])
    assert any("--judged-users" in note for note in found["notes"])
    assert found["repeats_listed"], "people take these things again and again"
    assert "repeats" in found["overall"], "the peer that knows it takes part"
    assert "diversity" not in found["lists"]["adapted"], "there are no texts to tell it from"
    assert found["overall"]["adapted"] == found["overall"]["start"], "nothing to adapt to in drawn clicks"
    assert found["headline"][0].endswith("users are not adapted to.")
    assert not any("difference can be told" in sentence for sentence in found["headline"]), "nothing was compared"


def test_intervals_are_percentiles_over_users_who_count_once() -> None:
    values, users = np.array([[1.0], [0.0], [0.0], [1.0]]), np.array([0, 1, 1, 1])
    means = figures.user_means(values, users)
    assert means[:, 0].tolist() == [1.0, pytest.approx(1 / 3)]
    mean, low, high = figures.bootstrap(means)[0]
    assert mean == pytest.approx(2 / 3)
    assert low == pytest.approx(1 / 3)
    assert high == 1.0


def test_lists_are_described_by_what_they_cover_and_how_alike_they_are() -> None:
    lists = np.array([[0, 1], [0, 1], [0, -1]])
    assert figures.coverage(lists, 4) == 0.5
    assert figures.gini(np.array([[0, 1, 2, 3]]), 4) == pytest.approx(0.0)
    assert figures.gini(np.array([[0], [0]]), 4) == pytest.approx(0.75)
    texts = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    assert figures.diversity(np.array([[0, 1]]), texts) == pytest.approx(1.0)
    assert figures.diversity(np.array([[0, 2]]), texts) == pytest.approx(0.0)
    assert figures.novelty(np.array([[1]]), np.array([6.0, 0.0])) == pytest.approx(3.0)
    bins = figures.reliability(np.array([0.1, 0.9, 0.2, 0.8]), np.array([0, 1, 0, 1], bool), bins=2)
    assert [hits for _, hits, _ in bins] == [0.0, 1.0]
    assert [score for score, _, _ in bins] == pytest.approx([0.15, 0.85])


def test_who_is_behind_is_not_called_ahead() -> None:
    assert figures.compared(Interval(0.02, 0.01, 0.03), "EASE") == "ahead of EASE: +0.0200 [+0.0100, +0.0300]"
    assert figures.compared(Interval(-0.02, -0.03, -0.01), "EASE").startswith("behind EASE: -0.0200")
    assert figures.compared(Interval(0.02, -0.01, 0.03), "EASE").startswith("not to be told from EASE: ")


def test_static_scores_are_ranked_without_what_is_masked() -> None:
    scores = np.arange(30, dtype=np.float32)[None]
    found = judge_scores(scores, [(np.array([29]), np.array([28, 0, 1, 2, 3]))])
    ideal = (1 / np.log2(np.arange(5) + 2)).sum()
    assert found[0].tolist() == pytest.approx([1 / ideal, 0.2])


def test_without_als_installed_a_backtest_takes_the_other_peers_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (backtest_peers.usual(), backtest_peers.notes_on(backtest_peers.DEFAULT)) == (backtest_peers.DEFAULT, [])
    monkeypatch.setattr(backtest_peers, "find_spec", lambda _name: None)
    assert backtest_peers.usual() == tuple(name for name in backtest_peers.DEFAULT if name != "als")
    backtest_peers.check_available(backtest_peers.usual())
    assert "innerloop[als]" in backtest_peers.notes_on(backtest_peers.usual())[0]
    assert backtest_peers.notes_on(["ease"]) == [], "whoever names peers knows which"
    with pytest.raises(backtest_peers.PeerUnavailable, match=r"innerloop\[als\]"):
        backtest_peers.check_available(["als"])
