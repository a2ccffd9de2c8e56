"""The batched inner step against the same mathematics in float64, user by user, and its known ways to go wrong."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.item_tables import ItemTables, assemble_items
from models.popularity import bucket_of, priors
from models.ranker import Ranker, TaskBatch, exclusions
from tests.factories import meta_parameters

ITEMS = [f"item-{number:03d}" for number in range(96)]
PARAMETERS = meta_parameters(ITEMS, text_dim=16, seed=3)
U, S = 16, 10


def tables() -> ItemTables:
    text = torch.nn.functional.normalize(torch.randn(len(ITEMS), 16, generator=torch.Generator().manual_seed(5)), dim=1)
    return assemble_items(PARAMETERS, text, torch.arange(len(ITEMS)))


RANKER = Ranker(PARAMETERS, tables())
PRIORS = priors(PARAMETERS.counts)


def tasks(seed: int = 1, num: int = U) -> TaskBatch:
    """Users with supports of every length from 0 to S, some history in their adapters, some excluded items."""
    draw = torch.Generator().manual_seed(seed)
    support = torch.full((num, S), -1)
    for user in range(num):
        length = user % (S + 1)
        if length:
            support[user, -length:] = torch.randperm(len(ITEMS), generator=draw)[:length]
    num_events = (support >= 0).sum(1)
    return TaskBatch(
        support=support,
        weights=torch.rand(num, S, generator=draw) + 0.5,
        num_events=num_events,
        state=torch.randn(num, 16, generator=draw) * (num_events[:, None] > 0),
        state_events=num_events.clone(),
        track=torch.zeros(num, 1),
        excluded=exclusions(torch.randint(-1, len(ITEMS), (num, 7), generator=draw), len(ITEMS)),
        prior_rows=bucket_of(num_events),
    )


def excluded_by(batch: TaskBatch, user: int) -> list[int]:
    rows: list[int] = (batch.excluded[user] < 0).nonzero()[:, 0].tolist()
    return rows


def targets_of(batch: TaskBatch, seed: int = 2) -> Tensor:
    return torch.randint(0, len(ITEMS), (len(batch.support),), generator=torch.Generator().manual_seed(seed))


def reference_residual(start: Tensor, target: int, excluded: list[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """g = f(target) - E_p[f] with p = softmax(tau * start) over what may be listed, in float64, item by item."""
    factors = RANKER.items.vectors[:, 16:].double().numpy()
    allowed = [item for item in range(len(ITEMS)) if item == target or item not in excluded]
    weight = {item: math.exp(PARAMETERS.tau * float(start[item])) for item in allowed}
    total = sum(weight.values())
    expected = sum(weight[item] / total * factors[item] for item in allowed)
    return np.asarray(factors[target] - expected - PARAMETERS.residual_mean.double().numpy())


def unmasked_start(batch: TaskBatch) -> Tensor:
    """The start's logits with nothing masked for being excluded later (the bonus list does know what is excluded)."""
    served = RANKER.served(batch, PRIORS)
    plain = served.start.double() @ RANKER.items.vectors[:, :16].double().T
    plain += served.prior_weight[:, None].double() * PRIORS[batch.prior_rows].double()
    padded = torch.nn.functional.pad(plain, (0, 1))
    return padded.scatter_add_(1, served.bonus_items, served.bonus.double())[:, :-1]


def test_a_step_is_the_float64_reference_for_every_user() -> None:
    batch, targets = tasks(), targets_of(tasks())
    step = RANKER.step(batch, PRIORS, targets)
    start = unmasked_start(batch)
    for user in range(U):
        target, excluded = int(targets[user]), excluded_by(batch, user)
        residual = reference_residual(start[user], target, excluded)
        expected = PARAMETERS.discount * batch.state[user].double().numpy() + residual
        np.testing.assert_allclose(step.state[user].numpy(), expected, atol=2e-6, rtol=1e-6)
        assert step.state_events[user] == batch.state_events[user] + 1


def test_the_deviation_is_one_map_step_inside_the_trust_region() -> None:
    batch = tasks()
    deviation = RANKER.served(batch, PRIORS).deviation.double().numpy()
    metric, precision = PARAMETERS.metric.double().numpy(), PARAMETERS.precision.double().numpy()
    clipped = 0
    for user in range(U):
        events = int(batch.state_events[user])
        if int(batch.num_events[user]) < PARAMETERS.step_from:
            assert not deviation[user].any()
            continue
        weight = sum(PARAMETERS.discount**age for age in range(events))
        step = batch.state[user].double().numpy() / (weight * metric + precision) / PARAMETERS.tau
        length = PARAMETERS.tau * math.sqrt(float((step**2 * metric).sum()))
        clipped += length > PARAMETERS.trust_radius
        np.testing.assert_allclose(
            deviation[user], step * min(1.0, PARAMETERS.trust_radius / length), atol=1e-6, rtol=1e-5
        )
    far = replace(batch, state=batch.state * 1000)
    longest = RANKER.served(far, PRIORS).deviation.double()
    lengths = PARAMETERS.tau * (longest.square() * PARAMETERS.metric.double()).sum(1).sqrt()
    assert float(lengths.max()) <= PARAMETERS.trust_radius * (1 + 1e-5)
    assert float(lengths.max()) > PARAMETERS.trust_radius * (1 - 1e-5)


def test_residuals_are_taken_against_the_start_not_the_adapted_prediction() -> None:
    batch, targets = tasks(), targets_of(tasks())
    empty = replace(batch, state=torch.zeros_like(batch.state), state_events=torch.zeros_like(batch.state_events))
    with_history, without = (RANKER.step(one, PRIORS, targets) for one in (batch, empty))
    learnt = with_history.state - PARAMETERS.discount * batch.state
    torch.testing.assert_close(learnt, without.state, atol=2e-6, rtol=1e-5)
    # the histories must matter to the adapted prediction, or the test could not fail
    assert not torch.allclose(with_history.loss_adapted, without.loss_adapted)


def test_learning_from_an_item_raises_it() -> None:
    batch, targets = tasks(), targets_of(tasks())
    fresh = replace(batch, state=torch.zeros_like(batch.state), state_events=torch.zeros_like(batch.state_events))
    fresh = replace(fresh, excluded=torch.zeros(U, len(ITEMS)))
    step = RANKER.step(fresh, PRIORS, targets)
    after = replace(fresh, state=step.state, state_events=step.state_events)
    chosen = torch.arange(U)[fresh.num_events >= PARAMETERS.step_from]
    before_logit = RANKER.logits(fresh, PRIORS)[0][chosen, targets[chosen]]
    after_logit = RANKER.logits(after, PRIORS)[0][chosen, targets[chosen]]
    assert bool((after_logit > before_logit).all())


def test_several_events_of_a_user_in_one_call_are_the_same_as_one_call_each() -> None:
    batch = tasks(num=8)
    chain = batch.taken([0, 4, 4, 4, 7])
    targets = torch.tensor([1, 2, 3, -1, 5])
    together = RANKER.step(chain, PRIORS, targets, torch.tensor([-1, -1, 1, 2, -1]))
    state, events = batch.state[[4]], batch.state_events[[4]]
    for row in (1, 2, 3):
        one = chain.taken([row])
        alone = RANKER.step(replace(one, state=state, state_events=events), PRIORS, targets[[row]])
        torch.testing.assert_close(together.loss_adapted[[row]], alone.loss_adapted, atol=1e-5, rtol=1e-5)
        state, events = alone.state, alone.state_events
        torch.testing.assert_close(together.state[[row]], state, atol=2e-6, rtol=1e-5)
        assert int(together.state_events[row]) == int(events)
    assert torch.equal(together.state[3], together.state[2]), "an item without a row teaches nothing"
    with pytest.raises(ValueError, match="oldest first"):
        RANKER.step(chain, PRIORS, targets, torch.tensor([-1, 2, -1, -1, -1]))


def test_a_row_does_not_depend_on_the_others_nor_on_padding() -> None:
    batch, targets = tasks(), targets_of(tasks())
    order = torch.randperm(U, generator=torch.Generator().manual_seed(9))
    shuffled = batch.taken(order)
    straight, mixed = RANKER.step(batch, PRIORS, targets), RANKER.step(shuffled, PRIORS, targets[order])
    poisoned = copy.deepcopy(batch)
    poisoned.weights[batch.support < 0] = torch.nan  # what padding holds must not be read
    read = RANKER.step(poisoned, PRIORS, targets)
    for name in ("state", "loss_adapted", "loss_start"):
        torch.testing.assert_close(getattr(mixed, name), getattr(straight, name)[order], atol=2e-6, rtol=1e-6)
        assert torch.equal(getattr(read, name), getattr(straight, name))


def test_excluded_items_are_not_listed_and_the_rest_is_in_order() -> None:
    batch = tasks()
    top = RANKER.rank(batch, PRIORS, 50)
    adapted, _ = RANKER.logits(batch, PRIORS)
    for user in range(U):
        listed = top.items[user].tolist()
        assert not set(listed) & set(excluded_by(batch, user))
        expected = torch.sort(adapted[user], descending=True, stable=True).indices[:50].tolist()
        assert listed == expected
        assert bool((top.logits[user].diff() <= 0).all())


def test_a_new_item_is_scored_from_its_text() -> None:
    text = torch.eye(16)[:3]
    new = assemble_items(PARAMETERS, text, torch.full((3,), -1))
    expected = torch.cat([text, torch.ones(3, 1)], 1) @ PARAMETERS.text_map
    torch.testing.assert_close(new.vectors[:, :16], expected[:, :16])
    assert not torch.allclose(new.vectors[0], new.vectors[1])


def test_a_learnt_vector_is_trusted_with_its_events() -> None:
    text = torch.eye(16)[:1]
    events = PARAMETERS.item_events.clone()
    for number, share in ((0.0, 0.0), (5.0, 0.5), (1e9, 1.0)):
        events[0] = number
        blended = assemble_items(replace(PARAMETERS, item_events=events), text, torch.tensor([0])).vectors[0, :16]
        predicted = (torch.cat([text, torch.ones(1, 1)], 1) @ PARAMETERS.text_map)[0, :16]
        expected = share * PARAMETERS.item_out[0] + (1 - share) * predicted
        torch.testing.assert_close(blended, expected, atol=1e-5, rtol=1e-5)
