import math

import pytest
import torch
from torch import Tensor

from models.chains import Chains
from models.inner_loop import InnerStep

U, N, F = 7, 30, 16


def inner_step(**changes: object) -> InnerStep:
    draw = torch.Generator().manual_seed(1)
    values: dict[str, object] = {
        "metric": torch.rand(F, generator=draw) * 0.1,
        "precision": torch.rand(F, generator=draw) * 5 + 1,
        "residual_mean": torch.randn(F, generator=draw) * 0.05,
        "tau": 1.5,
        "discount": 0.97,
        "trust_radius": 0.5,
        "step_from": 3,
    }
    return InnerStep(**(values | changes))  # type: ignore[arg-type]  # a table of fields, typed by the class


def factors() -> Tensor:
    return torch.randn((N, F), generator=torch.Generator().manual_seed(2)) / math.sqrt(F)


def predictions(num: int) -> Tensor:
    return torch.softmax(torch.randn((num, U, N), generator=torch.Generator().manual_seed(3)), 2)


def reference(step: InnerStep, prediction: Tensor, item_factors: Tensor, targets: list[int]) -> list[float]:
    """One user, one event after the other, in Python's float64."""
    metric, prior, mean = step.metric.tolist(), step.precision.tolist(), step.residual_mean.tolist()
    table, state, mass = item_factors.tolist(), [0.0] * F, 0.0
    for p, target in zip(prediction.tolist(), targets, strict=True):
        mass = step.discount * mass + 1.0
        for k in range(F):
            expected = sum(p[i] * table[i][k] for i in range(N))
            state[k] = step.discount * state[k] + table[target][k] - expected - mean[k]
    deviation = [a / (mass * h + c) / step.tau for a, h, c in zip(state, metric, prior, strict=True)]
    length = step.tau * math.sqrt(sum(d * d * h for d, h in zip(deviation, metric, strict=True)))
    return [d * min(1.0, step.trust_radius / length) for d in deviation]


@pytest.mark.parametrize(("discount", "radius"), [(0.97, 0.5), (1.0, 0.5), (0.97, 0.02)])
def test_the_batched_step_agrees_with_a_loop_in_float64(discount: float, radius: float) -> None:
    step, table, rounds = inner_step(discount=discount, trust_radius=radius), factors(), 40
    guesses = predictions(rounds)
    targets = torch.randint(N, (rounds, U), generator=torch.Generator().manual_seed(4))
    state = torch.zeros(U, F)
    for prediction, target in zip(guesses, targets, strict=True):
        state = learnt(step, state, step.residual(prediction, table, target))
    count = torch.full((U,), rounds)
    found = step.deviation(state, count, count)
    for user in range(U):
        wanted = reference(step, guesses[:, user], table, targets[:, user].tolist())
        torch.testing.assert_close(found[user], torch.tensor(wanted), atol=1e-6, rtol=0)
    # the case with the small radius must be limited, the others must not all be
    lengths = step.tau * (found.square() * step.metric).sum(1).sqrt()
    assert bool((lengths <= radius * (1 + 1e-5)).all())
    assert (radius == 0.02) == bool((lengths > radius * 0.999).all())


def learnt(step: InnerStep, state: Tensor, residual: Tensor) -> Tensor:
    """State after one more residual."""
    return Chains(None, torch.ones(len(state), dtype=torch.bool)).carry(step.discount, state, residual)[1]


def test_what_a_user_takes_scores_higher_afterwards_and_the_rest_lower() -> None:
    step, table = inner_step(residual_mean=torch.zeros(F)), factors()
    prediction = predictions(1)[0]
    targets = torch.arange(U)
    state = learnt(step, torch.zeros(U, F), step.residual(prediction, table, targets))
    change = step.deviation(state, torch.ones(U), torch.full((U,), 5)) @ table.T
    own = change.gather(1, targets[:, None])[:, 0]
    assert bool((own > (prediction * change).sum(1)).all())


def test_before_enough_events_nothing_moves() -> None:
    step = inner_step(step_from=3)
    moved = step.deviation(torch.ones(4, F), torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4])).abs().sum(1) > 0
    assert moved.tolist() == [False, False, True, True]


def test_without_events_the_deviation_is_zero_and_finite() -> None:
    zeros = torch.zeros(2, dtype=torch.int64)
    assert torch.equal(inner_step(step_from=0).deviation(torch.zeros(2, F), zeros, zeros), torch.zeros(2, F))


def test_errors_that_all_users_share_teach_nothing() -> None:
    table, prediction, targets = factors(), predictions(1)[0][:1], torch.tensor([3])
    shared = table[3] - prediction[0] @ table
    step = inner_step(residual_mean=shared)
    torch.testing.assert_close(step.residual(prediction, table, targets), torch.zeros(1, F))


def test_old_residuals_weigh_less_than_new_ones() -> None:
    step = inner_step(discount=0.5)
    old_then_new = learnt(step, learnt(step, torch.zeros(1, F), torch.ones(1, F)), torch.zeros(1, F))
    assert torch.equal(old_then_new, torch.full((1, F), 0.5))
    torch.testing.assert_close(step.weight(torch.tensor([0, 1, 2, 3])), torch.tensor([0.0, 1.0, 1.5, 1.75]))
