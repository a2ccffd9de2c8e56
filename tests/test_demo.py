"""The demo's figures: what a hit is, what a gain is, and that the same seed gives the same summary."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.demo_drift import Cure, Phase
from pipeline.demo_figures import Score, choose_user, gains
from pipeline.demo_view import Summary, text
from pipeline.reading import PartitionStatus, Recommendation


def batch(score: Score, users: list[str], adapted: list[int], start: list[int], popular: list[int]) -> None:
    losses = {"adapted": [1.0] * len(users), "start": [1.5] * len(users)}
    score.add(users, {"adapted": adapted, "start": start, "popular": popular}, losses)


def test_a_hit_is_a_rank_within_ten_and_an_item_without_a_vector_is_a_miss() -> None:
    score = Score()
    batch(score, ["u", "u", "v", "v"], adapted=[1, 10, 11, 0], start=[11, 10, 0, 0], popular=[0, 0, 0, 1])
    assert score.num_events == 4
    assert [score.rate(kind) for kind in ("adapted", "start", "popular")] == [0.5, 0.25, 0.25]


def test_only_the_users_in_question_count() -> None:
    score = Score(frozenset({"v"}))
    batch(score, ["u", "v"], adapted=[1, 20], start=[1, 1], popular=[1, 1])
    assert (score.num_events, score.rate("adapted"), list(score.by_user)) == (1, 0.0, ["v"])


def test_a_gain_is_the_mean_over_events_and_its_interval_resamples_users() -> None:
    score = Score()
    for user in range(200):
        better = user % 2 == 0
        batch(score, [f"u{user}"] * 4, adapted=[1] * 4, start=[99 if better else 1] * 4, popular=[99] * 4)
    found = gains(score, seed=0)
    assert found["hit_rate_over_start"].mean == pytest.approx(0.5)
    # The standard error of a share of one half among 200 users is 0.0354.
    assert found["hit_rate_over_start"].high - found["hit_rate_over_start"].low == pytest.approx(4 * 0.0354, rel=0.1)
    assert (found["hit_rate_over_popular"].low, found["hit_rate_over_popular"].high) == (1.0, 1.0)
    assert found["loss_under_start"].mean == pytest.approx(0.5)


def test_gains_depend_on_the_seed_alone_and_not_on_the_order_of_arrival() -> None:
    rng = np.random.default_rng(1)
    ranks = [[int(rank) for rank in rng.integers(0, 30, 3)] for _ in range(300)]
    scores = [Score(), Score()]
    for score, order in zip(scores, (range(300), reversed(range(300))), strict=True):
        for at in order:
            batch(score, [f"u{at % 50}"], *([rank] for rank in ranks[at]))
    assert gains(scores[0], 5) == gains(scores[1], 5)
    assert gains(scores[0], 5) != gains(scores[0], 6)


def test_no_events_have_no_gain() -> None:
    assert gains(Score(), 0) == {}
    assert Score().rate("adapted") == 0.0


def test_the_user_to_show_is_an_active_newcomer_chosen_by_the_seed() -> None:
    events = [{"user_id": f"u{user}"} for user in range(40) for _ in range(user * 4)]
    unseen = frozenset(f"u{user}" for user in range(0, 40, 2))
    chosen = {choose_user(events, unseen, seed) for seed in range(30)}
    assert chosen <= {f"u{user}" for user in range(8, 26, 2)}
    assert len(chosen) > 3
    assert choose_user(events, unseen, 1) == choose_user(list(reversed(events)), unseen, 1)


def test_the_summary_says_what_was_learnt_what_changed_and_how_to_query_it() -> None:
    items = [Recommendation(f"i{n}", 0.5, n, "popular", f"Film {n}") for n in range(1, 4)]
    after = [Recommendation(f"i{n}", 0.5, rank, "adapted", None) for rank, n in enumerate((3, 9, 1), 1)]
    score = Score()
    batch(score, ["u", "v"], adapted=[1, 1], start=[20, 1], popular=[20, 20])
    law = [PartitionStatus(0, 0, 5, 2, 1, 1, 0, 1, False, None, 5, 0)]  # type: ignore[arg-type]  # no time is shown
    shown = text(
        Summary(
            num_events=2,
            num_users=2,
            hit_rates={"adapted": 1.0},
            gains=gains(score, 0),
            law=law,
            lag=0,
            p50_ms=40,
            p99_ms=90,
            user_id="u7",
            lessons=["Film 0, 5 of 5"],
            before=items,
            after=after,
            later=frozenset({"i3"}),
            titles={"i1": "One", "i3": "Three"},
            cure=Cure([Phase("before", 10, 1, 5.0, 0.2), Phase("cured", 5, 2, 5.1, 0.19)], ["alarm, retrain"], "x.png"),
            seconds=100,
            home=None,
        )
    )
    assert "learnt    Film 0, 5 of 5" in shown
    assert "chosen by this user later on: 1 of the list before, 1 of the list after" in shown
    assert "* Three" in shown
    assert "partition 0: 5 - 0 = 2 + 1 + 1 + 0 + 1   holds" in shown
    assert "adapted over un-adapted, hit rate@10     +0.5000" in shown
    assert "innerloop.recommend('u7', 10)" in shown
    cured = next(line for line in shown.splitlines() if line.startswith("  cured"))
    assert cured.split() == ["cured", "version", "2", "loss", "5.100", "hit", "rate@10", "0.190", "(5", "events)"]
    assert "  alarm, retrain\n  drawn to x.png" in shown


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_same_seed_gives_the_same_summary_at_any_rate_and_leaves_nothing_running(tmp_path: Path) -> None:
    def demo(rate: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "pipeline.cli", "demo", "--json", "--rate", str(rate)]
        variables = {**os.environ, "TMPDIR": str(tmp_path), "INNERLOOP_TOPIC_INTERACTIONS": "not-the-demos"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # Scores are compared to 1e-6, as the contract says: a sum of rounded losses may differ in its last digits.
        found: dict[str, Any] = json.loads(done.stdout, parse_float=lambda number: round(float(number), 6))
        return {name: value for name, value in found.items() if name not in {"p50_ms", "p99_ms", "seconds"}}

    slow, fast = demo(400), demo(2000)
    assert slow == fast
    assert slow["gains"]["hit_rate_over_start"]["low"] > 0
    assert not any(row["broken"] for row in slow["law"])
    assert list(tmp_path.glob("innerloop-demo-*")) == []
