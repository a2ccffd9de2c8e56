"""The shops that repeats are judged on: people take their favourites, and nobody lists better than the truth."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.backtest_figures import METRICS
from tests.benchmarks.repeats import PEERS, Figures, Shop, clearly_below, favourites, joined, judge, tabulated


@pytest.mark.parametrize(("seed", "share", "mean"), [(0, 0.6, 21), (1, 0.7, 60)])
def test_everybody_takes_six_favourites_with_the_stated_share(seed: int, share: float, mean: int) -> None:
    choices = favourites(seed).choices
    truth = np.stack([choice.truth for choice in choices if choice.truth is not None])
    favourite = truth > 0.05  # nothing else is as likely
    assert set(favourite.sum(1).tolist()) == {6}
    taken = favourite[np.arange(len(choices)), [choice.item for choice in choices]]
    assert abs(taken.mean() - share) < 0.03
    assert abs(len(choices) / len({choice.user for choice in choices}) / mean - 1) < 0.1
    times = [choice.event["ts"] for choice in choices]
    assert times == sorted(times)


def test_nobody_lists_better_than_the_truth() -> None:
    choices = [choice for choice in favourites(0).choices if choice.user < 200]
    figures = judge(Shop(choices, []), seed=0)
    reached = figures.reached()
    assert reached["best"] > 0.4
    assert max(own for name, own in reached.items() if name != "best") < 0.9 * reached["best"]
    assert reached["repeats"] > 2 * reached["popular-by-position"]
    assert tabulated(figures)["reached"]["best"][1] == 1.0


def test_a_bucket_is_clearly_below_where_its_users_are_over_all_shops() -> None:
    def shop(seed: int) -> Figures:
        users, num_events = np.arange(15).repeat(10), np.tile(np.arange(10), 15)
        peer = np.random.default_rng(seed).random((150, len(METRICS)))
        ours = peer + np.where(num_events > 5, -0.1, 0.1)[:, None]
        return Figures({"adapted": ours, "best": peer, **dict.fromkeys(PEERS, peer)}, users, num_events)

    table = tabulated(joined([shop(0), shop(1)]))
    users = {label: num for label, (num, *_) in table["ahead"]["repeats"].items()}
    assert users == {"all": 30, "0": 30, "1-2": 30, "3-5": 30, "6-10": 30}
    assert clearly_below(table) == [
        "K 6-10 against ItemKNN + prior + repeat",
        "K 6-10 against repeat the support + prior",
    ]
    assert not clearly_below(tabulated(shop(0))), "fifteen users decide nothing"
