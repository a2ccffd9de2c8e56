"""Learners and adapters against references of their own, in float64, and the known ways to get them wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models import episodic_training
from models.adapters import (
    ADAPTERS,
    CONTEXT_DECAY,
    Adapter,
    BottleneckAdapter,
    LowRankAdapter,
    adapter_named,
    context_of,
)
from models.episodic_training import Episodes, Leaves, Serving, fit, outer_loss
from models.inner_loop import InnerStep
from models.inner_losses import ABSENT, CrossEntropy, HonestQuadratic, InnerLoss
from models.learners import LEARNERS, PRIOR_EVENTS, InnerSteps

U, N, C, G, F = 5, 20, 9, 3, 6


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Finite differences need it; one thread, because the tensors are small."""
    before = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def limits(**changes: object) -> InnerStep:
    values: dict[str, object] = {
        "metric": torch.linspace(0.5, 0.1, F),
        "precision": torch.linspace(1.0, 2.0, F),
        "residual_mean": torch.zeros(F),
        "tau": 1.5,
        "discount": 0.9,
        "trust_radius": 1e9,
        "step_from": 0,
    }
    return InnerStep(**(values | changes))  # type: ignore[arg-type]  # a table of fields, typed by the class


def cross_entropy() -> CrossEntropy:
    """Users with 9, 8, 7 … candidates that are there, and a last prediction that some users lack."""
    there = torch.arange(C) < C - torch.arange(U)[:, None]
    offset = draw(U, G, C, seed=1).masked_fill(~there[:, None], ABSENT)
    target = torch.zeros(U, G, C)
    target[torch.arange(U)[:, None], torch.arange(G), torch.arange(G)] = draw(U, G, seed=2).abs() + 0.5
    target[::2, G - 1] = 0
    return CrossEntropy(draw(U, C, F, seed=3) * there[..., None], offset, target)


def honest() -> HonestQuadratic:
    return HonestQuadratic(draw(U, F, seed=4) * 3, torch.arange(U) + 1.0, limits().metric, limits().tau)


LOSSES: dict[str, Callable[[], InnerLoss]] = {"cross-entropy": cross_entropy, "honest": honest}


def context() -> Tensor:
    return torch.nn.functional.normalize(draw(U, F, seed=5), dim=1)


def episodes(loss: InnerLoss) -> Episodes:
    start = draw(U, N, seed=6)
    start[:, 3] = -torch.inf
    query = torch.randint(4, N, (U, 2), generator=torch.Generator().manual_seed(7))
    query[0, 1] = -1
    return Episodes(loss, context(), start, query, torch.arange(U) + 5, torch.arange(U))


def serving() -> Serving:
    return Serving(draw(N, F, seed=8), limits())


def leaves(name: str, adapter: Adapter) -> Leaves:
    """Somewhere on the way, where no slope is zero."""
    made = Leaves.of(LEARNERS[name], adapter, limits(), torch.Generator().manual_seed(0))
    return replace(made, initial=made.initial + 0.3 * draw(adapter.size, seed=9), log_rates=made.log_rates + 2.0)


def one_user(loss: InnerLoss, user: int) -> InnerLoss:
    if isinstance(loss, CrossEntropy):
        return CrossEntropy(*(tensor[user : user + 1] for tensor in vars(loss).values()))
    assert isinstance(loss, HonestQuadratic)
    return replace(loss, state=loss.state[user : user + 1], weight=loss.weight[user : user + 1])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_slope_by_hand_is_that_of_autograd(loss: str) -> None:
    made, vector = LOSSES[loss](), draw(U, F, seed=10).requires_grad_()
    (expected,) = torch.autograd.grad(made.value(vector).sum(), vector)
    torch.testing.assert_close(made.slope(vector.detach()), expected)
    assert bool((expected.abs() > 1e-6).all())


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_pull_back_is_that_of_autograd(name: str) -> None:
    adapter = adapter_named(name, F)
    parameters = draw(U, adapter.size, seed=11).requires_grad_()
    slope = draw(U, F, seed=12)
    (expected,) = torch.autograd.grad(adapter.collapse(parameters, context()), parameters, slope)
    torch.testing.assert_close(adapter.pull_back(parameters.detach(), context(), slope), expected)


def test_a_collapsed_low_rank_update_scores_as_the_items_pushed_through_it() -> None:
    adapter, factors = LowRankAdapter(F, rank=2), draw(N, F)
    parameters = draw(U, adapter.size, seed=1)
    up, down = parameters[:, : 2 * F].view(U, F, 2), parameters[:, 2 * F :].view(U, 2, F)
    for user in range(U):
        items = factors @ up[user] @ down[user]  # [N, F]: every item through this user's update
        served = factors @ adapter.collapse(parameters, context())[user]
        torch.testing.assert_close(served, items @ context()[user])


def test_a_collapsed_bottleneck_scores_as_the_network_on_every_pair() -> None:
    adapter, factors = BottleneckAdapter(F, rank=2), draw(N, F)
    parameters = draw(U, adapter.size, seed=1)
    for user in range(U):
        up, constant, down, bias = torch.split(parameters[user], [2 * F, F, 2 * F, 2])
        network = torch.nn.Sequential(torch.nn.Linear(F, 2), torch.nn.Tanh(), torch.nn.Linear(2, F))
        state = (down.view(2, F), bias, up.view(F, 2), constant)
        network.load_state_dict(dict(zip(network.state_dict(), state, strict=True)))
        served = factors @ adapter.collapse(parameters, context())[user]
        torch.testing.assert_close(served, factors @ network(context()[user]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_begins_without_a_deviation_but_not_without_a_slope(name: str) -> None:
    adapter = adapter_named(name, F)
    initial = adapter.initial(torch.Generator().manual_seed(0)).expand(U, -1)
    assert torch.equal(adapter.collapse(initial, context()), torch.zeros(U, F))
    assert bool((adapter.pull_back(initial, context(), draw(U, F)).abs().sum(1) > 0).all())
    assert adapter.pull_back(initial, context(), draw(U, F)).shape == (U, adapter.size)


def test_a_context_is_the_support_pooled_and_padding_is_not_read() -> None:
    factors = draw(N, F)
    support, weights = torch.tensor([[-1, 2, 5], [-1, -1, -1]]), torch.tensor([[torch.nan, 0.5, 2.0], [torch.nan] * 3])
    pooled = 0.5 * CONTEXT_DECAY * factors[2] + 2.0 * factors[5]
    found = context_of(factors, support, weights)
    torch.testing.assert_close(found[0], pooled / torch.linalg.vector_norm(pooled))
    assert torch.equal(found[1], torch.zeros(F))


def test_taking_an_item_raises_it_and_lowers_what_was_passed_over() -> None:
    # the sign of the cross-entropy: one candidate taken of four, from equal offsets
    loss = CrossEntropy(torch.eye(4)[None], torch.zeros(1, 1, 4), torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]))
    adapter = adapter_named("vector", 4)
    steps = InnerSteps(adapter, torch.zeros(4), torch.ones(1, 4), torch.ones(4))
    moved = steps.vector(loss, torch.zeros(1, 4))[0]
    assert moved[1] > 0
    assert bool((moved[[0, 2, 3]] < 0).all())
    assert float(loss.value(moved[None])) < float(loss.value(torch.zeros(1, 4)))
    assert loss.solve(torch.ones(4))[0].argmax() == 1


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["maml", "meta-sgd", "anil"])
def test_the_second_order_meta_gradient_is_the_finite_difference(name: str, loss: str, adapter: str) -> None:
    learner, made = LEARNERS[name], adapter_named(adapter, F)
    at, tasks = leaves(name, made), episodes(LOSSES[loss]())
    moved = [leaf.requires_grad_() for leaf in at.moved_by(learner)]
    torch.autograd.backward(outer_loss(learner, at.steps(learner, made), tasks, serving()))

    def value(changed: Leaves) -> float:
        return float(outer_loss(learner, changed.steps(learner, made), tasks, serving()))

    for field, leaf in zip(("initial", "log_rates"), moved, strict=False):
        for place in range(0, leaf.numel(), max(1, leaf.numel() // 7)):
            nudge = torch.zeros_like(leaf).flatten().index_fill(0, torch.tensor([place]), 1e-5).view_as(leaf)
            up, down = (replace(at.copy(), **{field: leaf.detach() + sign * nudge}) for sign in (1, -1))
            assert leaf.grad is not None
            assert float(leaf.grad.flatten()[place]) == pytest.approx((value(up) - value(down)) / 2e-5, abs=1e-8)
    assert moved[0].grad is not None
    assert bool(moved[0].grad.any())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_order_gradient_is_that_at_the_adapted_parameters(loss: str) -> None:
    learner, adapter = LEARNERS["fomaml"], adapter_named("lora", F)
    at, tasks = leaves("fomaml", adapter), episodes(LOSSES[loss]())
    adapted = at.steps(learner, adapter).parameters(tasks.loss, tasks.context).requires_grad_()
    logits = tasks.start + adapter.collapse(adapted, tasks.context) @ serving().factors.T
    logs = torch.log_softmax(limits().tau * logits.clamp(min=ABSENT), 1)
    per_user = [
        -torch.stack([logs[user, row] for row in rows if row >= 0]).mean()
        for user, rows in enumerate(tasks.query.tolist())
    ]
    (expected,) = torch.autograd.grad(torch.stack(per_user).mean(), adapted)
    at.initial.requires_grad_()
    torch.autograd.backward(outer_loss(learner, at.steps(learner, adapter), tasks, serving()))
    assert at.initial.grad is not None
    torch.testing.assert_close(at.initial.grad, expected.sum(0))
    second = at.copy()
    second.initial.requires_grad_()
    torch.autograd.backward(outer_loss(LEARNERS["maml"], second.steps(LEARNERS["maml"], adapter), tasks, serving()))
    assert second.initial.grad is not None
    assert not torch.allclose(second.initial.grad, at.initial.grad)


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
def test_anil_is_maml_with_the_head_alone_adapted(name: str) -> None:
    adapter, loss = adapter_named(name, F), cross_entropy()
    at = leaves("anil", adapter)
    found = at.steps(LEARNERS["anil"], adapter).parameters(loss, context())
    body = at.initial[~adapter.head].expand(U, -1)
    head = at.initial[adapter.head].expand(U, -1)
    for rate in at.log_rates.exp():  # by autograd, and with parameters that have no body
        head = head.detach().requires_grad_()
        whole = torch.zeros(U, adapter.size)
        whole = whole.masked_scatter(adapter.head, head).masked_scatter(~adapter.head, body)
        mean = loss.value(adapter.collapse(whole, context())) / (loss.mass + PRIOR_EVENTS)
        head = head - rate[adapter.head] * torch.autograd.grad(mean.sum(), head)[0]
    torch.testing.assert_close(found[:, adapter.head], head.detach())
    assert torch.equal(found[:, ~adapter.head], body)


def test_reptile_moves_towards_where_the_steps_end() -> None:
    learner, adapter = LEARNERS["reptile"], adapter_named("lora", F)
    at, tasks = leaves("reptile", adapter), episodes(cross_entropy())
    before = at.initial.clone()
    ends = [
        at.steps(learner, adapter).parameters(one_user(tasks.loss, user), tasks.context[user : user + 1])[0]
        for user in range(U)
    ]
    at.initial.requires_grad_()
    optimiser = torch.optim.SGD([at.initial], lr=0.1)
    torch.autograd.backward(outer_loss(learner, at.steps(learner, adapter), tasks, serving()))
    optimiser.step()
    torch.testing.assert_close(at.initial.detach(), before + 0.1 * (torch.stack(ends).mean(0) - before))


def test_ridge_is_least_squares_solved_user_by_user() -> None:
    loss, precision = cross_entropy(), torch.linspace(0.5, 2.0, F)
    found = InnerSteps(adapter_named("vector", F), torch.zeros(F), torch.zeros(0, F), precision).vector(loss, context())
    for user in range(U):
        there = slice(0, C - user)  # without its padding
        predicted = torch.softmax(loss.offset[user, :, there], 1)
        target = loss.target[user, :, there]
        residual = (target - target.sum(1, keepdim=True) * predicted).sum(0)
        rows = np.concatenate([loss.vectors[user, there].numpy(), np.diag(np.sqrt(precision.numpy()))])
        wanted = np.linalg.lstsq(rows, np.concatenate([residual.numpy(), np.zeros(F)]), rcond=None)[0]
        np.testing.assert_allclose(found[user].numpy(), wanted, atol=1e-10)


def test_ridge_on_honest_residuals_is_the_honest_step() -> None:
    events, step = torch.arange(U), limits()
    loss = HonestQuadratic(draw(U, F), step.weight(events), step.metric, step.tau)
    steps = InnerSteps(adapter_named("vector", F), torch.zeros(F), torch.zeros(0, F), step.precision)
    torch.testing.assert_close(steps.vector(loss, context()), step.deviation(loss.state, events, events))


def test_many_steps_on_honest_residuals_end_where_the_loss_is_least() -> None:
    loss, adapter = honest(), adapter_named("vector", F)
    steps = InnerSteps(adapter, torch.zeros(F), torch.full((5000, F), 50.0), torch.ones(F))
    least = loss.state / (loss.tau * loss.weight[:, None] * loss.metric)
    torch.testing.assert_close(steps.vector(loss, context()), least, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_batch_of_users_is_the_users_one_by_one(loss: str, adapter: str) -> None:
    made = adapter_named(adapter, F)
    steps = leaves("maml", made).steps(LEARNERS["maml"], made)
    together = steps.vector(LOSSES[loss](), context())
    for user in range(U):
        alone = steps.vector(one_user(LOSSES[loss](), user), context()[user : user + 1])
        torch.testing.assert_close(together[user], alone[0])
    assert bool((together.diff(dim=0).abs() > 1e-3).any())


def test_padding_has_neither_value_nor_slope_nor_a_part_in_the_meta_gradient() -> None:
    learner, adapter, loss = LEARNERS["meta-sgd"], adapter_named("bottleneck", F), cross_entropy()
    padded = CrossEntropy(
        torch.nn.functional.pad(loss.vectors, (0, 0, 0, 4)),
        torch.nn.functional.pad(torch.nn.functional.pad(loss.offset, (0, 4), value=ABSENT), (0, 0, 0, 2)),
        torch.nn.functional.pad(loss.target, (0, 4, 0, 2)),
    )
    gradients = []
    for one in (loss, padded):
        at = leaves("meta-sgd", adapter)
        moved = [leaf.requires_grad_() for leaf in at.moved_by(learner)]
        torch.autograd.backward(outer_loss(learner, at.steps(learner, adapter), episodes(one), serving()))
        gradients.append([leaf.grad for leaf in moved])
    for plain, other in zip(*gradients, strict=True):
        assert plain is not None
        assert other is not None
        assert bool(torch.isfinite(other).all())
        torch.testing.assert_close(plain, other)
    nobody = CrossEntropy(torch.zeros(1, C, F), torch.full((1, G, C), ABSENT), torch.zeros(1, G, C))
    steps = leaves("maml", adapter).steps(LEARNERS["maml"], adapter)
    start = adapter.collapse(steps.initial[None], context()[:1])
    torch.testing.assert_close(steps.vector(nobody, context()[:1]), start, atol=0, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_inner_loop_is_the_same_under_no_grad_and_the_outer_one_sees_through_it(loss: str) -> None:
    learner, adapter = LEARNERS["meta-sgd"], adapter_named("vector", F)
    at = leaves("meta-sgd", adapter)
    with torch.no_grad():
        served = at.steps(learner, adapter).vector(LOSSES[loss](), context())
    moved = [leaf.requires_grad_() for leaf in at.moved_by(learner)]
    trained = at.steps(learner, adapter).vector(LOSSES[loss](), context())
    torch.testing.assert_close(served, trained.detach())
    assert not torch.allclose(served, at.initial.detach().expand(U, -1)), "nothing was learnt under no_grad"
    torch.autograd.backward(trained.square().sum())
    assert all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in moved)


def test_what_a_user_takes_later_does_not_reach_the_inner_loop() -> None:
    # support and query are apart in time: another query changes the outer loss and no vector
    learner, adapter, tasks = LEARNERS["maml"], adapter_named("vector", F), episodes(cross_entropy())
    steps, other = leaves("maml", adapter).steps(learner, adapter), (tasks.query + 1).clamp(max=N - 1)
    later = tasks._replace(query=other)
    logits = [serving().logits(steps, one) for one in (tasks, later)]
    assert torch.equal(*logits)
    assert float(outer_loss(learner, steps, tasks, serving())) != float(outer_loss(learner, steps, later, serving()))


class KnownTruth:
    """Users whose next item follows from their state: half the factors speak, the other half is noise."""

    def __init__(self, num: int = 800) -> None:
        self.factors = draw(40, F, seed=20)
        self.users = torch.arange(num) % 80
        taste = draw(80, F, seed=21)[self.users] * (torch.arange(F) < F // 2)
        self.state = 10 * taste + 10 * draw(num, F, seed=22) * (torch.arange(F) >= F // 2)
        chances = torch.softmax(3 * taste @ self.factors.T, 1)
        self.query = torch.multinomial(chances, 3, generator=torch.Generator().manual_seed(23))

    def episodes(self, numbers: Tensor) -> Episodes:
        num = len(numbers)
        loss = HonestQuadratic(self.state[numbers], torch.full((num,), 20.0), limits().metric, limits().tau)
        start, many = torch.zeros(num, 40), torch.full((num,), 20)
        pooled = torch.nn.functional.normalize(self.state[numbers], dim=1)
        return Episodes(loss, pooled, start, self.query[numbers], many, self.users[numbers])


@pytest.mark.parametrize(("name", "adapter"), [("meta-sgd", "vector"), ("ridge", "vector"), ("maml", "lora")])
def test_fitting_finds_what_speaks_and_ends_early(name: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodic_training, "MAX_EPOCHS", 6)
    source, made, told = KnownTruth(), adapter_named(adapter, F), list[int]()
    served = Serving(source.factors, limits())
    everything = torch.arange(len(source.users))
    fitted = fit(
        LEARNERS[name], made, source, served, seed=0, numbers=everything, tell=lambda done, _of: told.append(done)
    )
    untrained = Leaves.of(LEARNERS[name], made, limits(), torch.Generator().manual_seed(0)).steps(LEARNERS[name], made)
    before, start = episodic_training.figures(untrained, source, everything, served)
    after, _ = episodic_training.figures(fitted.steps, source, everything, served)
    assert float(after.mean()) > float(before.mean()) > float(start.mean())
    assert told == list(range(fitted.epochs + 1))
    again = fit(LEARNERS[name], made, source, served, seed=0, numbers=everything, tell=lambda *_: None)
    assert torch.equal(again.steps.initial, fitted.steps.initial)
    assert torch.equal(again.steps.rates, fitted.steps.rates)


def test_an_adapter_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no adapter 'mamba', only vector, lora, bottleneck"):
        adapter_named("mamba", F)
