import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.inner_loop import InnerStep
from models.item_tables import ItemTables, assemble_items, initial_counts
from models.meta_parameters import MetaParameters
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import BONUS_SLOTS, BONUS_SUPPORT, LOSS_LIMIT, Ranker, TaskBatch, exclusions
from models.top_items import best_rows, highest
from tests.factories import meta_parameters

N, U, S, T = 70, 16, 25, 16


def texts() -> Tensor:
    return torch.randn(N, T, generator=torch.Generator().manual_seed(9)) / 4


def make_ranker(**changes: Any) -> Ranker:
    ids = [f"item{i:03d}" for i in range(N)]
    usual: dict[str, Any] = {"support_size": S, "item_bias": torch.linspace(-0.5, 0.5, N)}
    parameters = dataclasses.replace(meta_parameters(ids, text_dim=T), **(usual | changes))
    return Ranker(parameters, assemble_items(parameters, texts(), torch.arange(N)))


def make_tasks(*, seed: int = 0, users: int = U) -> TaskBatch:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, S + 1, (users,), generator=draw)
    lengths[0] = 0
    support = torch.stack([torch.randperm(N, generator=draw)[:S] for _ in range(users)])
    support[torch.arange(S) < S - lengths[:, None]] = -1
    return TaskBatch(
        support=support,
        weights=torch.rand(users, S, generator=draw) + 0.5,
        num_events=lengths + 40 * (lengths == S),
        state=torch.randn(users, 16, generator=draw),
        state_events=lengths,
        track=torch.zeros(users, 1),
        excluded=exclusions(support, N),
        prior_rows=bucket_of(lengths),
    )


def make_priors() -> Tensor:
    return torch.randn(NUM_BUCKETS, N, generator=torch.Generator().manual_seed(5))


def some_targets(users: int = U) -> Tensor:
    return torch.randint(N, (users,), generator=torch.Generator().manual_seed(6))


def rows_of(tasks: TaskBatch, rows: Tensor) -> TaskBatch:
    return tasks.taken(rows)


def reference_logits(ranker: Ranker, tasks: TaskBatch, priors: Tensor, user: int) -> tuple[Tensor, Tensor]:
    """One user's adapted and start logits in float64, written as the served form is described."""
    p, items = ranker.parameters, ranker.items
    dims, parts = p.item_out.shape[1], len(p.parts)
    weights = p.part_weights[int(bucket_of(tasks.num_events)[user])].double()
    had = [
        (age, int(row), float(tasks.weights[user, S - 1 - age]))
        for age, row in enumerate(reversed(tasks.support[user].tolist()))
        if row >= 0
    ]
    out, factors = items.vectors[:, :dims].double(), items.vectors[:, dims:].double()
    start, bonus = weights[0] * priors[tasks.prior_rows[user]].double(), torch.zeros(N + 1, dtype=torch.float64)
    for part in range(parts):
        decay = float(p.part_decays[part])
        gains = [(age, row, weight * decay**age) for age, row, weight in had]
        vector = sum((g * items.item_in[row, part].double() for _, row, g in gains), torch.zeros(dims).double())
        spread = sum(g * g * float(items.spread[row, part]) for _, row, g in gains)
        deviation = math.sqrt(float(vector.square().sum()) + spread)
        if deviation == 0:
            continue
        start = start + weights[1 + part] / deviation * (out @ vector)
        for age, row, g in gains:
            if age < BONUS_SUPPORT:
                values = items.neighbour_values[row, part].double()
                bonus.index_add_(0, items.neighbour_items[row], weights[1 + part] / deviation * g * values)
    start = start + p.item_bias * (int(tasks.num_events[user]) > 0)
    total = start + bonus[:-1]
    gone = tasks.excluded[user] < 0
    total[gone] = -math.inf
    listed = total.argsort(descending=True)[:BONUS_SLOTS]
    start[listed] += bonus[listed]
    start[gone] = -math.inf
    inner = InnerStep(p.metric, p.precision, p.residual_mean, p.tau, p.discount, p.trust_radius, p.step_from)
    one = slice(user, user + 1)
    moved = inner.deviation(tasks.state[one].double(), tasks.state_events[one], tasks.num_events[one])[0]
    return start + factors @ moved.double(), start


def test_logits_are_those_of_the_served_form_computed_alone_in_float64() -> None:
    ranker, tasks, priors = make_ranker(), make_tasks(), make_priors()
    adapted, start = ranker.logits(tasks, priors)
    for user in range(U):
        wanted = reference_logits(ranker, tasks, priors, user)
        torch.testing.assert_close(adapted[user].double(), wanted[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(start[user].double(), wanted[1], atol=1e-5, rtol=1e-5)
    assert bool((adapted != start).any())


def test_served_parts_add_up_to_the_logits() -> None:
    ranker, tasks, priors = make_ranker(), make_tasks(), make_priors()
    served = ranker.served(tasks, priors)
    tasks.excluded = torch.zeros(U, N)
    # the list was chosen with exclusions, so only what is not excluded can be compared
    free = ranker.served(tasks, priors)
    logits = free.q @ ranker.items.vectors.T + free.prior_weight[:, None] * priors[tasks.prior_rows]
    logits += (tasks.num_events > 0)[:, None] * ranker.parameters.item_bias
    padded = torch.cat([logits, logits[:, :1]], 1).scatter_add_(1, free.bonus_items, free.bonus)[:, :N]
    torch.testing.assert_close(padded, ranker.logits(tasks, priors)[0])
    assert served.bonus_items.shape == (U, BONUS_SLOTS)


def test_padding_never_shows_however_poisoned() -> None:
    ranker, tasks, priors, targets = make_ranker(), make_tasks(), make_priors(), some_targets()
    clean, listed = ranker.step(tasks, priors, targets), ranker.rank(tasks, priors, 10)
    tasks.weights[tasks.support < 0] = float("nan")
    poisoned, again = ranker.step(tasks, priors, targets), ranker.rank(tasks, priors, 10)
    for one, other in zip((*clean, *listed), (*poisoned, *again), strict=True):
        assert torch.equal(one, other)
    assert bool(torch.isfinite(poisoned.state).all())


def test_more_padding_in_front_changes_nothing_that_counts() -> None:
    ranker, tasks, priors, targets = make_ranker(), make_tasks(), make_priors(), some_targets()
    short = rows_of(tasks, torch.arange(U))
    short.support, short.weights = short.support[:, 5:], short.weights[:, 5:]
    long = rows_of(short, torch.arange(U))
    long.support = torch.cat([torch.full((U, 5), -1), short.support], 1)
    long.weights = torch.cat([torch.full((U, 5), 1e9), short.weights], 1)
    for one, other in zip(ranker.step(short, priors, targets), ranker.step(long, priors, targets), strict=True):
        torch.testing.assert_close(one, other)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    ranker, tasks, priors, targets = make_ranker(), make_tasks(users=64), make_priors(), some_targets(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(7))
    straight = (*ranker.step(tasks, priors, targets), *ranker.rank(tasks, priors, 10))
    shuffled = rows_of(tasks, order)
    turned = (*ranker.step(shuffled, priors, targets[order]), *ranker.rank(shuffled, priors, 10))
    for one, other in zip(straight, turned, strict=True):
        assert torch.equal(one[order], other)
    # neighbours that carry nonsense
    shuffled.state[1:], shuffled.weights[1:], shuffled.support[1:] = float("nan"), float("inf"), 0
    spoilt = ranker.step(shuffled, priors, targets[order])
    for one, other in zip(turned, spoilt, strict=False):
        assert torch.equal(one[0], other[0])


def test_residuals_are_taken_against_the_start_and_not_the_adapted_prediction() -> None:
    ranker, tasks, priors, targets = make_ranker(), make_tasks(), make_priors(), some_targets()
    moved = rows_of(tasks, torch.arange(U))
    moved.state = torch.randn(U, 16, generator=torch.Generator().manual_seed(11)) * 5
    discount = ranker.parameters.discount
    one, other = ranker.step(tasks, priors, targets), ranker.step(moved, priors, targets)
    assert not torch.equal(one.loss_adapted, other.loss_adapted)
    assert torch.equal(one.loss_start, other.loss_start)
    torch.testing.assert_close(one.state - discount * tasks.state, other.state - discount * moved.state)


def test_what_was_learnt_is_the_item_less_what_the_start_expected() -> None:
    ranker, tasks, priors, targets = make_ranker(), make_tasks(), make_priors(), some_targets()
    tasks.excluded = torch.zeros(U, N)
    _, start = ranker.logits(tasks, priors)
    factors = ranker.items.vectors[:, -16:]
    prediction = torch.softmax(ranker.parameters.tau * start, 1)
    wanted = ranker.parameters.discount * tasks.state + factors[targets] - prediction @ factors
    torch.testing.assert_close(ranker.step(tasks, priors, targets).state, wanted)


def test_a_user_who_keeps_taking_an_item_gets_it_ranked_higher() -> None:
    ranker, priors = make_ranker(trust_radius=10.0), make_priors()
    tasks = make_tasks()
    tasks.state, tasks.state_events = torch.zeros(U, 16), torch.zeros(U, dtype=torch.int64)
    tasks.num_events, tasks.excluded = torch.full((U,), 30), torch.zeros(U, N)
    targets = some_targets()
    first = last = ranker.step(tasks, priors, targets)
    for _ in range(10):
        last = ranker.step(tasks, priors, targets)
        tasks.state, tasks.state_events, tasks.track = last.state, last.state_events, last.track
    assert torch.equal(first.loss_start, last.loss_start)
    assert bool((last.loss_adapted < first.loss_adapted).all())


def test_events_of_one_user_in_one_call_equal_one_call_each() -> None:
    ranker, tasks, priors, targets = make_ranker(), make_tasks(), make_priors(), some_targets()
    previous = torch.tensor([-1, -1, 0, 1, 2, -1, 4, 6, 3, -1, -1, -1, -1, -1, -1, 7])
    targets[4] = -1  # an event without a row learns nothing and hands the state on
    together = ranker.step(tasks, priors, targets, previous)
    alone = rows_of(tasks, torch.arange(U))
    for row, before in enumerate(previous.tolist()):
        if before >= 0:
            alone.state[row], alone.state_events[row] = together.state[before], together.state_events[before]
            alone.track[row] = together.track[before]
    for one, other in zip(together, ranker.step(alone, priors, targets), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="oldest first"):
        ranker.step(tasks, priors, targets, torch.arange(U) + 1)


def test_an_item_without_a_row_teaches_nothing() -> None:
    ranker, tasks, priors = make_ranker(), make_tasks(), make_priors()
    step = ranker.step(tasks, priors, torch.full((U,), -1))
    assert torch.equal(step.state, tasks.state)
    assert torch.equal(step.state_events, tasks.state_events)
    assert {*step.rank_adapted.tolist(), *step.rank_start.tolist(), *step.rank_popular.tolist()} == {0}
    assert torch.equal(step.loss_adapted, torch.full((U,), LOSS_LIMIT))


def test_an_excluded_item_is_never_listed_but_judged_when_taken_again() -> None:
    ranker, tasks, priors = make_ranker(), make_tasks(), make_priors()
    top = ranker.rank(tasks, priors, N)
    for user in range(U):
        gone = (tasks.excluded[user] < 0).nonzero()[:, 0].tolist()
        listed = [row for row in top.items[user].tolist() if row >= 0]
        assert sorted([*listed, *gone]) == list(range(N))
        assert bool((top.logits[user, len(listed) :] == -math.inf).all())
    again = tasks.support[:, -1]
    step = ranker.step(tasks, priors, again)
    assert torch.equal(step.rank_start >= 1, again >= 0)
    assert bool((step.loss_start < LOSS_LIMIT).any())


def test_ranks_count_the_items_ahead_and_order_ties_by_row() -> None:
    ranker, tasks, priors, targets = make_ranker(), make_tasks(), make_priors(), some_targets()
    tasks.excluded = torch.zeros(U, N)
    adapted, _ = ranker.logits(tasks, priors)
    wanted = [1 + int((row > row[t]).sum()) for row, t in zip(adapted, targets.tolist(), strict=True)]
    assert ranker.step(tasks, priors, targets).rank_adapted.tolist() == wanted
    tied = ranker.step(tasks, torch.zeros(NUM_BUCKETS, N), targets).rank_popular
    assert torch.equal(tied, targets + 1)


def test_the_best_rows_are_those_of_a_full_sort_ties_and_zeros_included() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (20, 50), generator=draw).float()
    scores[3] = torch.randn(50, generator=draw)
    scores[4, ::2] = -0.0
    scores[5] = -math.inf
    scores[6, 3:] = -math.inf
    items, values = best_rows(scores, 12)
    for row, found in zip(scores.tolist(), items.tolist(), strict=True):
        wanted = sorted((column for column in range(50) if row[column] > -math.inf), key=lambda c: (-row[c], c))[:12]
        assert found == wanted + [-1] * (12 - len(wanted))
    kept = items >= 0
    assert torch.equal(values[kept], scores.gather(1, items.clamp(min=0))[kept])
    wide, _ = best_rows(scores, 60)
    assert wide.shape == (20, 60)
    assert bool((wide[:, 50:] == -1).all())


def test_listed_logits_are_calibrated_by_the_users_bucket() -> None:
    calibration = torch.stack([torch.arange(1.0, 9.0), -torch.arange(8.0)], 1)
    plain, scaled = make_ranker(), make_ranker(calibration=calibration)
    tasks, priors = make_tasks(), make_priors()
    one, other = plain.rank(tasks, priors, 5), scaled.rank(tasks, priors, 5)
    scale, offset = calibration[bucket_of(tasks.num_events)].unbind(1)
    assert torch.equal(one.items, other.items)
    torch.testing.assert_close(other.logits, one.logits * scale[:, None] + offset[:, None])


def test_where_the_step_is_off_adapted_is_start() -> None:
    adapted, start = make_ranker(use_inner_step=False).logits(make_tasks(), make_priors())
    assert torch.equal(adapted, start)


def shuffled_catalogue(parameters: MetaParameters, embeddings: Tensor, index: Tensor) -> ItemTables:
    return assemble_items(parameters, embeddings[index.clamp(min=0)], index)


def test_scores_do_not_depend_on_where_items_stand_in_the_catalogue() -> None:
    parameters = make_ranker().parameters
    index = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    ranker, turned = make_ranker(), Ranker(parameters, shuffled_catalogue(parameters, texts(), index))
    tasks, priors = make_tasks(), make_priors()
    place = torch.empty(N, dtype=torch.int64)
    place[index] = torch.arange(N)
    moved = rows_of(tasks, torch.arange(U))
    moved.support = torch.where(tasks.support >= 0, place[tasks.support.clamp(min=0)], -1)
    moved.excluded = exclusions(moved.support, N)
    torch.testing.assert_close(turned.logits(moved, priors[:, index])[0], ranker.logits(tasks, priors)[0][:, index])


def test_a_new_item_is_where_its_text_says_and_a_known_one_in_between() -> None:
    parameters = meta_parameters([f"item{i:03d}" for i in range(N)], text_dim=T, shrinkage=50.0)  # 50 events each
    embeddings = texts()
    index = torch.arange(N)
    index[7] = -1
    tables = assemble_items(parameters, embeddings, index)
    said = torch.cat([embeddings, torch.ones(N, 1)], 1) @ parameters.text_map
    dims = parameters.item_out.shape[1]
    torch.testing.assert_close(tables.vectors[7, :dims], said[7, :dims])
    torch.testing.assert_close(tables.vectors[8, :dims], (said[8, :dims] + parameters.item_out[8]) / 2)
    assert bool((tables.neighbour_items[7] == N).all())
    assert not bool((tables.neighbour_items == 7).any())
    counts = initial_counts(parameters, index)
    assert bool((counts[:, 7] == 0).all())
    assert torch.equal(counts[:, 8], parameters.counts[:, 8])


def test_meta_parameters_come_back_from_their_parts_and_refuse_foreign_ones() -> None:
    parameters = make_ranker().parameters
    again = MetaParameters.from_parts(parameters.tensors(), parameters.metadata())
    assert again.metadata() == parameters.metadata()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in parameters.tensors().items())
    with pytest.raises(ValueError, match="metric has shape"):
        dataclasses.replace(parameters, metric=torch.ones(3))
    with pytest.raises(ValueError, match="names differ"):
        MetaParameters.from_parts(parameters.tensors(), {**parameters.metadata(), "colour": "red"})
    with pytest.raises(ValueError, match="format"):
        MetaParameters.from_parts(parameters.tensors(), {**parameters.metadata(), "format": 2})
    with pytest.raises(ValueError, match="float64"):
        MetaParameters.from_parts({**parameters.tensors(), "metric": parameters.metric.double()}, parameters.metadata())


@pytest.mark.parametrize(("num", "k"), [(70, 20), (1696, 20), (1682, 50), (10_007, 50), (333, 1), (12, 12)])
def test_the_highest_of_long_rows_are_those_of_a_plain_selection(num: int, k: int) -> None:
    scores = torch.randn(9, num, generator=torch.Generator().manual_seed(num))
    scores[1], scores[2, k // 2 :], scores[3] = 0.0, -math.inf, torch.arange(num)
    scores[4] = torch.arange(num, 0, -1)  # the highest lie side by side, in many stretches
    scores[5] = scores[5].round()  # many are equal
    values, columns = highest(scores, k)
    assert torch.equal(values.sort(descending=True).values, scores.topk(k).values)
    assert torch.equal(scores.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())
    in_order = scores.sort(stable=True, descending=True).indices[:, :k]
    assert torch.equal(best_rows(scores, k)[0], torch.where(scores.gather(1, in_order) > -math.inf, in_order, -1))
