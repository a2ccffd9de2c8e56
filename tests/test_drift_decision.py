"""Alarm to verdict, condition by condition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.drift_decision import Circumstances, Evidence, Thresholds, decide, weigh

LIMITS = Thresholds()
CLEAR = Evidence(
    labels=6_000, users=900, expected_loss=5.0, worse=0.06, standard_error=0.005, worse_lately=0.06, top_share=0.02
)
FREE = Circumstances(new_labels=6_000, days=3, gain=0.2, labels_per_day=10_000)


def test_when_every_condition_holds_the_model_is_trained_again() -> None:
    assert decide(CLEAR, FREE, LIMITS).verdict == "retrain"


@pytest.mark.parametrize(
    ("evidence", "now", "verdict", "reason"),
    [
        ({"labels": 1_999}, {}, "wait", "1,999 labels"),
        ({"users": 499}, {}, "wait", "499 users"),
        ({}, {"new_labels": 4_999}, "wait", "4,999 labels since the alarm"),
        ({}, {"gain": None}, "wait", "not known yet"),
        ({}, {"frozen": "release week"}, "wait", "frozen: release week"),
        ({}, {"blind": "half the losses are no numbers"}, "wait", "blind"),
        ({}, {"busy": "request 3 is pending"}, "wait", "request 3 is pending"),
        ({}, {"retrained_today": 4}, "wait", "4 retrainings within a day"),
        ({}, {"dead_letters": 0.01}, "wait", "dead letters"),
        ({}, {"seconds_since": 6 * 3600.0 - 1, "labels_since": 49_999}, "wait", "cooling down"),
        ({}, {"seconds_since": 6 * 3600.0, "labels_since": 0}, "retrain", ""),
        ({}, {"seconds_since": 0.0, "labels_since": 50_000}, "retrain", ""),
        ({}, {"seconds_since": 6 * 3600.0, "labels_since": 99_999, "rejected": 1}, "wait", "after 1 rejected"),
        ({}, {"seconds_since": 24 * 3600.0, "labels_since": 0, "rejected": 2}, "retrain", ""),
        ({}, {"days": 0}, "no", "0 whole days"),
        ({"worse": 0.019}, {}, "no", "not confirmed"),
        ({"standard_error": 0.021}, {}, "no", "not confirmed"),
        ({"worse": -0.05}, {}, "no", "not confirmed"),
        ({"worse_lately": 0.01}, {}, "no", "absorbed"),
        ({"top_share": 0.2}, {}, "no", "20% of the excess"),
        ({}, {"gain": 0.004}, "no", "not worth it"),
        ({}, {"gain": -0.1}, "no", "not worth it"),
        ({"worse": 0.0}, {"new_labels": 4_999}, "wait", "needed to learn from"),
    ],
)
def test_each_condition_alone_stands_in_the_way(
    evidence: dict[str, Any], now: dict[str, Any], verdict: str, reason: str
) -> None:
    decision = decide(replace(CLEAR, **evidence), replace(FREE, **now), LIMITS)
    assert decision.verdict == verdict
    assert reason in decision.reason


def labels(num_users: int, num_labels: int, seed: int = 0, level: float = 5.0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    users = rng.integers(0, num_users, num_labels)
    return level + rng.normal(0, 2, num_labels), np.full(num_labels, level), users


def test_a_loss_that_rose_for_everybody_is_evidence() -> None:
    loss, expected, users = labels(2_000, 8_000)
    found = weigh(loss + 0.3, expected, users, LIMITS)
    assert found.worse == pytest.approx(0.06, abs=0.015)
    assert found.standard_error == pytest.approx(2 / np.sqrt(8_000) / 5, rel=0.15)
    assert found.top_share < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_one_in_a_hundred_users_with_inverted_labels_moves_no_model(seed: int) -> None:
    loss, expected, users = labels(2_000, 12_000, seed)
    loss[users < 20] += 18.0
    found = weigh(loss, expected, users, LIMITS)
    assert found.worse > max(LIMITS.least_worse, 3 * found.standard_error), "it must be the influence that refuses"
    assert decide(found, FREE, LIMITS).reason.startswith("1% of the users cause")


def test_one_busy_user_counts_for_a_hundredth() -> None:
    loss, expected, users = labels(2_000, 6_000)
    users[:2_000], loss[:2_000] = 7, 15.0
    found = weigh(loss, expected, users, LIMITS)
    assert found.worse < 0.05
    assert found.standard_error > 0.0


def test_labels_of_one_user_are_one_observation() -> None:
    loss, expected, users = labels(500, 10_000)
    loss = loss + np.random.default_rng(1).normal(0, 2, 500)[users]
    assert weigh(loss, expected, users, LIMITS).standard_error > 3 * 2 / np.sqrt(10_000) / 5
