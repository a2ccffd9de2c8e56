"""Verdicts on versions: arrays in, a decision with its reason out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.judgement import Losses, Rules, canary, paired, slices_of, steadied, successor

RULES = Rules(least_events=500, least_users=50, slice_events=100, canary_events=400)


def losses(mean: float, *, events: int = 2000, users: int = 200, seed: int = 0) -> Losses:
    draw = np.random.default_rng(seed)
    whose = draw.integers(users, size=events)
    return Losses(mean + draw.normal(size=users)[whose] + draw.normal(size=events), whose)


def test_a_challenger_that_is_better_beyond_chance_is_good_with_its_interval() -> None:
    live = losses(5.0)
    noise = np.random.default_rng(1).normal(size=2000)
    verdict = paired(live, live.loss - 0.1 + 0.5 * noise, RULES)
    assert verdict.good is True
    gain, low, high = verdict.figures["gain"]
    assert 0.05 < low < gain < high < 0.15


@pytest.mark.parametrize("gain", [0.0, -0.1])
def test_a_challenger_that_is_no_better_is_not_promoted(gain: float) -> None:
    live = losses(5.0)
    noise = np.random.default_rng(1).normal(size=2000)
    verdict = paired(live, live.loss - gain + 0.5 * (noise - noise.mean()), RULES)
    assert verdict.good is False
    assert "not shown to be better" in verdict.reason


def test_a_gain_that_one_busy_user_makes_alone_is_none() -> None:
    live = losses(5.0)
    users = live.users.copy()
    users[:1000] = 0
    challenger = live.loss - np.where(users == 0, 1.0, -0.02)
    assert paired(replace(live, users=users), challenger, RULES).good is False


def test_a_slice_that_is_worse_by_more_than_one_percent_rejects_what_is_better_on_the_whole() -> None:
    live = losses(5.0)
    new = np.arange(2000) % 10 == 0
    challenger = live.loss - np.where(new, -0.08, 0.2)
    judged = replace(live, slices={"new items": new, "known items": ~new})
    verdict = paired(judged, challenger, RULES)
    assert verdict.good is False
    assert "new items" in verdict.reason
    assert paired(judged, challenger, replace(RULES, slice_worse=0.05)).good is True
    assert paired(judged, challenger, replace(RULES, slice_events=300)).good is True, "too few to tell"


@pytest.mark.parametrize(("events", "users"), [(400, 200), (2000, 20)])
def test_too_few_later_events_or_users_give_no_verdict(events: int, users: int) -> None:
    live = losses(5.0, events=events, users=users)
    assert paired(live, live.loss - 1.0, RULES).good is None


def test_slices_cover_every_event_once_by_bucket() -> None:
    num_events = np.array([0, 1, 2, 3, 10, 50, 100, 101, 5000])
    new = np.array([True, False] * 4 + [True])
    scenes = ["home", None, "search"] * 3
    masks = slices_of(num_events, new, np.zeros(9, np.int64) + 2, scenes, {2: "click", 3: "cart"})
    buckets = [mask for name, mask in masks.items() if name.startswith("K ")]
    assert np.array(buckets).sum(0).tolist() == [1] * 9
    assert [name for name in masks if name.startswith("type")] == ["type click"]
    assert masks["K 101+"].sum() == 2
    places = {name: np.flatnonzero(mask).tolist() for name, mask in masks.items() if name.startswith("scene")}
    assert places == {"scene home": [0, 3, 6], "scene search": [2, 5, 8]}


def test_a_canary_that_does_worse_than_the_other_partitions_is_bad_and_an_equal_one_good() -> None:
    before, others_before = losses(5.0, seed=1), losses(5.2, seed=2)
    for rise, good in ((0.6, False), (0.0, True)):
        # everybody's losses rose: that is not the canary's doing
        since, others_since = losses(5.3 + rise, seed=3), losses(5.5, seed=4)
        assert canary((before, since), (others_before, others_since), RULES).good is good


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_canary_beside_nobody_is_compared_with_what_was_before(silent: int) -> None:
    nobody = Losses(np.zeros(0), np.zeros(0, np.int64))
    others = [losses(5.0, seed=2), losses(5.0, seed=4)] if silent < 2 else [nobody, nobody]
    others[silent % 2] = nobody
    for mean, good in ((5.0, True), (6.0, False)):
        verdict = canary((losses(5.0, seed=1), losses(mean, seed=3)), (others[0], others[1]), RULES)
        assert verdict.good is good, verdict.reason


def test_nothing_before_steadies_nothing() -> None:
    none = np.zeros(0), np.zeros(0, np.int64)
    assert steadied(np.array([1.0, 2.0]), np.array([3, 4]), none).tolist() == [1.0, 2.0]


def test_a_canary_is_given_time_while_nothing_is_wrong_and_stopped_early_when_something_is() -> None:
    before, others = losses(5.0, seed=1), (losses(5.0, seed=2), losses(5.0, seed=5))
    few = {"events": 150, "users": 100, "seed": 3}
    assert canary((before, losses(5.0, **few)), others, RULES).good is None
    assert canary((before, losses(9.0, **few)), others, RULES).good is False
    assert canary((before, losses(9.0, events=10, users=5)), others, RULES).good is None


def test_a_successor_is_judged_by_the_losses_before_it() -> None:
    before = losses(5.0, seed=1)
    assert successor(before, losses(5.6, seed=2), RULES).good is False
    assert successor(before, losses(5.0, seed=2), RULES).good is True
    assert successor(before, losses(4.0, seed=2), RULES).good is True
    assert successor(Losses(np.zeros(0), np.zeros(0, np.int64)), losses(5.0), RULES).good is None


def test_steadied_losses_vary_less_and_differ_as_the_losses_do() -> None:
    draw = np.random.default_rng(0)
    ranks = draw.integers(1, 1000, size=(2, 5000))
    loss = np.log(ranks) + draw.normal(size=(2, 5000)) * 0.3 + [[0.0], [0.5]]
    before, since = (steadied(loss[at], ranks[at], (loss[0], ranks[0])) for at in (0, 1))
    assert before.std() < 0.5 * loss[0].std()
    assert since.mean() - before.mean() == pytest.approx(0.5, abs=0.02)
