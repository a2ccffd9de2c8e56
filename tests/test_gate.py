"""The gate per user: an adapter is served as long as it does not lose to its start, and learns in any case."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.figures import surest
from models.gate import DIVERGED, GATED, SERVED, UNUSED, Gate
from models.item_tables import assemble_items
from models.popularity import bucket_of
from models.ranker import Ranker, Step, TaskBatch, exclusions
from tests.factories import meta_parameters

ITEMS = [f"item-{number:02d}" for number in range(48)]
PARAMETERS = meta_parameters(ITEMS, text_dim=8, seed=3)
PRIORS = torch.randn(8, len(ITEMS), generator=torch.Generator().manual_seed(4))
U = 16


def ranker_with(**changes: object) -> Ranker:
    parameters = replace(PARAMETERS, **changes)  # type: ignore[arg-type]  # a table of fields
    return Ranker(parameters, assemble_items(parameters, torch.zeros(len(ITEMS), 8), torch.arange(len(ITEMS))))


def make_tasks(num: int = U, seed: int = 1) -> TaskBatch:
    draw = torch.Generator().manual_seed(seed)
    num_events = torch.randint(3, 40, (num,), generator=draw)
    return TaskBatch(
        support=torch.randint(0, len(ITEMS), (num, 10), generator=draw),
        weights=torch.ones(num, 10),
        num_events=num_events,
        state=torch.randn(num, 16, generator=draw),
        state_events=num_events.clone(),
        track=torch.zeros(num, 1),
        excluded=exclusions(torch.randint(-1, len(ITEMS), (num, 5), generator=draw), len(ITEMS)),
        prior_rows=bucket_of(num_events),
    )


def some_targets(num: int = U, seed: int = 2) -> Tensor:
    return torch.randint(0, len(ITEMS), (num,), generator=torch.Generator().manual_seed(seed))


def after(tasks: TaskBatch, step: Step) -> TaskBatch:
    return replace(tasks, state=step.state, state_events=step.state_events, track=step.track)


def only(tasks: TaskBatch, rows: list[int]) -> TaskBatch:
    return tasks.taken(rows)


def test_a_losing_adapter_is_not_served_but_learns_and_returns_once_it_wins() -> None:
    ranker, tasks = ranker_with(gate_credit=0.5), make_tasks()
    closed = replace(tasks, track=torch.full((U, 1), -0.51))
    start = ranker.logits(tasks, PRIORS)[1]
    assert torch.equal(ranker.logits(closed, PRIORS)[0], start)
    assert not torch.allclose(ranker.logits(tasks, PRIORS)[0], start)
    served, gated = ranker.rank(tasks, PRIORS, 10), ranker.rank(closed, PRIORS, 10)
    assert set(served.use.tolist()) == {SERVED}
    assert set(gated.use.tolist()) == {GATED}
    assert torch.equal(gated.items, torch.sort(start, descending=True, stable=True).indices[:, :10])

    open_step, closed_step = (ranker.step(one, PRIORS, some_targets()) for one in (tasks, closed))
    assert torch.equal(closed_step.loss_adapted, closed_step.loss_start)
    assert torch.equal(closed_step.rank_adapted, closed_step.rank_start)
    assert torch.equal(closed_step.state, open_step.state), "what is not served learns all the same"
    gain = (open_step.loss_start - open_step.loss_adapted)[:, None]
    torch.testing.assert_close(open_step.track, gain)
    torch.testing.assert_close(closed_step.track, PARAMETERS.gate_discount * -0.51 + gain)
    uses = ranker.rank(after(closed, closed_step), PRIORS, 5).use
    assert torch.equal(uses == SERVED, closed_step.track[:, 0] >= -0.5)
    assert len(set(uses.tolist())) == 2, "some must have won, some not"


def test_several_events_of_a_user_pass_the_gate_as_if_they_came_one_by_one() -> None:
    # hardly any credit, so that gates open and close within the call
    ranker, tasks = ranker_with(gate_credit=0.02, gate_discount=0.5), make_tasks(8)
    order = [0, 4, 4, 4, 7, 4, 7, 4]
    targets = some_targets(len(order), seed=8)
    targets[2] = -1
    previous = torch.tensor([-1, -1, 1, 2, -1, 3, 4, 5])
    together = ranker.step(only(tasks, order), PRIORS, targets, previous)
    state = {user: only(tasks, [user]) for user in order}
    gated = set()
    for row, user in enumerate(order):
        gated |= {bool(state[user].track < -0.02)}
        alone = ranker.step(state[user], PRIORS, targets[[row]])
        for name in ("state", "track", "loss_adapted", "loss_start"):
            torch.testing.assert_close(getattr(together, name)[[row]], getattr(alone, name), atol=1e-5, rtol=1e-5)
        assert int(together.state_events[row]) == int(alone.state_events)
        assert int(together.rank_adapted[row]) == int(alone.rank_adapted)
        state[user] = after(state[user], alone)
    assert gated == {False, True}, "the case must have both"


def test_a_diverged_adapter_falls_back_to_the_start_and_its_mates_are_bit_equal() -> None:
    ranker, tasks = ranker_with(), make_tasks()
    sick = after(tasks, ranker.step(tasks, PRIORS, some_targets()))
    mates = [row for row in range(U) if row != 5]
    for poison in (torch.nan, torch.inf, -1e30):
        poisoned = replace(sick, state=sick.state.clone())
        poisoned.state[5, 2] = poison
        well, ill = ranker.step(sick, PRIORS, some_targets(seed=3)), ranker.step(poisoned, PRIORS, some_targets(seed=3))
        for name in Step._fields:
            assert torch.equal(getattr(well, name)[mates], getattr(ill, name)[mates])
        assert float(ill.loss_adapted[5]) == float(ill.loss_start[5])
        assert not bool(ill.state[5].any())
        assert int(ill.state_events[5]) == 0
        top, healthy = (ranker.rank(after(sick, step), PRIORS, 10) for step in (ill, well))
        assert top.use.tolist() == [DIVERGED if row == 5 else healthy.use[row] for row in range(U)]
        assert torch.equal(top.items[mates], healthy.items[mates])
        assert torch.equal(top.logits[mates], healthy.logits[mates])
        # a poisoned state that has not met an event yet is not served either
        assert int(ranker.rank(poisoned, PRIORS, 10).use[5]) == DIVERGED
        again = ranker.step(after(sick, ill), PRIORS, some_targets(seed=4))
        assert int(again.state_events[5]) == 1
        assert float(again.track[5]) < -PARAMETERS.gate_credit, "it has to win its way back"


def test_what_has_learnt_nothing_yet_is_no_adapter() -> None:
    fresh = replace(make_tasks(), state=torch.zeros(U, 16), state_events=torch.zeros(U, dtype=torch.int64))
    assert set(ranker_with().rank(fresh, PRIORS, 3).use.tolist()) == {UNUSED}
    assert set(ranker_with(use_inner_step=False).rank(make_tasks(), PRIORS, 3).use.tolist()) == {UNUSED}
    early = ranker_with(step_from=30).rank(make_tasks(), PRIORS, 3)
    assert torch.equal(early.use == UNUSED, make_tasks().num_events < 30)


def test_a_setting_is_the_default_one_unless_validation_users_say_otherwise() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 300, generator=draw) * 0.01
    assert surest(noise) == 0
    better = noise + torch.tensor([[0.0], [0.0], [0.01]])
    assert surest(better) == 2
    assert surest(better[:, :1]) == 0, "of one user chance knows no limits"


def test_the_track_forgets() -> None:
    gate = Gate(discount=0.5, credit=1.0)
    track = gate.follow(torch.tensor([-3.0, 0.0, gate.shut]), torch.tensor([0.4, -1.1, 0.0]))
    torch.testing.assert_close(track, torch.tensor([-1.1, -1.1, -1.0]))
    assert gate.is_open(track).tolist() == [False, False, True]
