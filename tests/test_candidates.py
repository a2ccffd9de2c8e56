"""Sampled candidates against the same mathematics in float64, item by item, and against the whole catalogue."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.candidates import Candidates, Sampling, draw
from models.ranker import Ranker, Step
from tests.test_honest_step import ITEMS, PARAMETERS, PRIORS, RANKER, U, tables, targets_of, tasks

WEIGHTS = torch.linspace(1, 200, len(ITEMS))


def shared(num: int, turn: int = 0) -> Candidates:
    drawn = draw(WEIGHTS, num, turn=turn)
    return Candidates(*(column.repeat(U, 1) for column in drawn))


def sampled(candidates: Candidates, targets: Tensor) -> Step:
    return RANKER.step(tasks(), PRIORS, targets, None, candidates)


def test_a_sampled_step_is_the_float64_reference_for_every_user() -> None:
    batch, targets, candidates = tasks(), targets_of(tasks()), shared(24)
    step = sampled(candidates, targets)
    start = RANKER.logits(batch, PRIORS)[1]
    factors = RANKER.items.vectors[:, 16:].double().numpy()
    checked = 0
    for user in range(U):
        target = int(targets[user])
        if batch.excluded[user, target] < 0:
            continue  # what an excluded target scores is not seen from outside
        checked += 1
        weight = {target: math.exp(PARAMETERS.tau * float(start[user, target]))}
        for row, minus_log_chance in zip(*(column[user].tolist() for column in candidates), strict=True):
            if row != target and minus_log_chance > -math.inf:
                weight[row] = math.exp(PARAMETERS.tau * float(start[user, row]) + minus_log_chance)
        total = sum(weight.values())
        expected = sum(one / total * factors[row] for row, one in weight.items())
        learnt = factors[target] - expected - PARAMETERS.residual_mean.double().numpy()
        before = PARAMETERS.discount * batch.state[user].double().numpy()
        np.testing.assert_allclose(step.state[user].numpy(), before + learnt, atol=2e-6, rtol=1e-6)
        assert math.isclose(float(step.loss_start[user]), -math.log(weight[target] / total), abs_tol=2e-6)
    assert checked > U // 2


def test_candidates_that_are_the_whole_catalogue_give_what_the_whole_catalogue_gives() -> None:
    targets = targets_of(tasks())
    every = Candidates(torch.arange(len(ITEMS)).repeat(U, 1), torch.zeros(U, len(ITEMS)))
    for one, other in zip(sampled(every, targets), RANKER.step(tasks(), PRIORS, targets), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_over_the_turns_candidates_expect_what_the_whole_catalogue_expects() -> None:
    targets = targets_of(tasks())
    whole = RANKER.step(tasks(), PRIORS, targets).state
    few = [sampled(shared(24, turn), targets).state for turn in range(200)]
    mean = torch.stack(few).mean(0)
    assert float((mean - whole).norm() / whole.norm()) < 0.03
    uncorrected = [
        sampled(Candidates(drawn.columns, torch.zeros_like(drawn.correction)), targets).state
        for drawn in (shared(24, turn) for turn in range(200))
    ]
    assert (torch.stack(uncorrected).mean(0) - whole).norm() > 2 * (mean - whole).norm()


def test_everybody_draws_the_same_and_every_item_has_its_turn() -> None:
    first, again = draw(WEIGHTS, 24, turn=3), draw(WEIGHTS, 24, turn=3)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    turns = [draw(WEIGHTS, 24, turn=turn) for turn in range(400)]
    drawn = torch.zeros(len(ITEMS))
    for columns, correction in turns:
        real = columns[correction > -math.inf]
        assert len(set(real.tolist())) == len(real) >= 22
        drawn[real] += 1
    chance = (23 * WEIGHTS**0.75 / (WEIGHTS**0.75).sum()).clamp(max=1.0)
    torch.testing.assert_close(drawn / 400, chance, atol=0.01, rtol=0.05)


def test_small_catalogues_are_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RANKER.candidates(0) is None
    monkeypatch.setattr(Ranker, "sampling", Sampling(from_items=len(ITEMS), num=24))
    found = Ranker(PARAMETERS, tables()).candidates(7)
    assert found is not None
    assert found.columns.shape == (24,)
