"""(b) The inner step with gather and state update, and the top 50, for all users of a batch at once.

Three things are measured, each beside the same mathematics user by user in the same run:

* the step alone: a user's start vector → softmax over the whole catalogue → honest residual → state → deviation,
  states gathered from and scattered into a table of users; and the same over sampled candidates;
* `Ranker.step` as the worker calls it: the start built from 60 support items and the bonus list, losses and ranks too;
* the best 50 of the catalogue by `best_rows`, the matrix product included.

Every result is compared with the same in float64. Letters: U users, S support slots, N items, D and F dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.candidates import Candidates, draw, predict
from models.inner_loop import InnerStep
from models.item_tables import LINE, ItemTables
from models.meta_parameters import MetaParameters
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import Ranker, Step, TaskBatch, exclusions
from models.table_fitting import NUM_FACTORS
from models.top_items import best_rows
from pipeline.task_batches import largest_chunk
from tests.benchmarks.measuring import medians, table
from tests.benchmarks.scene import NUM_ITEMS, SUPPORT_SIZE, TOP_N, Options, catalogue, one_thread, parameters

TABLE_USERS = 20_000
TOLERANCE = 1e-6
WIDE = 64  # factors of published figures; what meta-training serves has NUM_FACTORS
SAMPLED_CHUNK = 2048  # users whose scores of the candidates stay in the cache, as those of a worker's chunks do


Way = Callable[[InnerStep, tuple[Tensor, Tensor], "Users"], Tensor]


@dataclass
class Users:
    """Users of a table [T, …] and one event of U of them, in the precision of `start`."""

    start: Tensor
    prior: Tensor
    state: Tensor
    count: Tensor
    num_events: Tensor
    slots: Tensor
    targets: Tensor

    def keep(self, slots: Tensor, state: Tensor, count: Tensor) -> None:
        """Put the states of some users back."""
        self.state.index_copy_(0, slots, state)
        self.count.index_copy_(0, slots, count)

    def copy(self, dtype: torch.dtype = torch.float32) -> Users:
        """The same users, to be changed apart."""
        return Users(
            self.start.to(dtype), self.prior.to(dtype), self.state.to(dtype, copy=True), self.count.clone(),
            self.num_events, self.slots, self.targets,
        )  # fmt: skip


def draw_users(values: MetaParameters, num_users: int, device: str) -> Users:
    """U distinct users of a table of TABLE_USERS, in random places, with some history."""
    draw = torch.Generator().manual_seed(1)
    num_items, dims = values.item_out.shape
    users = Users(
        start=torch.randn(TABLE_USERS, dims, generator=draw),
        prior=torch.randn(num_items, generator=draw),
        state=torch.randn(TABLE_USERS, values.item_factors.shape[1], generator=draw) * 0.1,
        count=torch.randint(0, 50, (TABLE_USERS,), generator=draw),
        num_events=torch.randint(1, 80, (TABLE_USERS,), generator=draw),
        slots=torch.randperm(TABLE_USERS, generator=draw)[:num_users],
        targets=torch.randint(0, num_items, (num_users,), generator=draw),
    )
    return Users(**{name: tensor.to(device) for name, tensor in vars(users).items()})


def inner_step(values: MetaParameters, device: str, dtype: torch.dtype = torch.float32) -> InnerStep:
    """The step of these parameters, in float32 as served or in float64 as a reference."""
    return InnerStep(
        metric=values.metric.to(device, dtype),
        precision=values.precision.to(device, dtype),
        residual_mean=values.residual_mean.to(device, dtype),
        tau=values.tau,
        discount=values.discount,
        trust_radius=values.trust_radius,
        step_from=values.step_from,
    )


def batched(inner: InnerStep, tables: tuple[Tensor, Tensor], users: Users, chunk: int = 256) -> Tensor:
    """Deviations [U, F]; the states of the table move."""
    (out, factors), short = tables, -len(users.prior) % LINE
    out, factors = functional.pad(inner.tau * out.T, (0, short)).contiguous(), functional.pad(factors, (0, 0, 0, short))
    prior = functional.pad(inner.tau * users.prior, (0, short), value=-torch.inf)  # whole cache lines, as a ranker has
    scores, deviations = prior.new_empty(chunk, len(prior)), []
    for slots, targets in zip(torch.split(users.slots, chunk), torch.split(users.targets, chunk), strict=True):
        logits = torch.addmm(prior, users.start.index_select(0, slots), out, out=scores[: len(slots)])
        prediction = torch.softmax(logits, 1, out=logits)
        residual = inner.residual(prediction, factors, targets)
        state = inner.discount * users.state.index_select(0, slots) + residual
        count = users.count.index_select(0, slots) + 1
        users.keep(slots, state, count)
        deviations.append(inner.deviation(state, count, users.num_events.index_select(0, slots)))
    return torch.cat(deviations)


def sampled(
    inner: InnerStep, tables: tuple[Tensor, Tensor], users: Users, candidates: Candidates, chunk: int = SAMPLED_CHUNK
) -> Tensor:
    """The same over candidates [C] that all users share."""
    (out, factors), columns = tables, candidates.columns
    near, known = inner.tau * out[columns].T, factors[columns]
    prior, num = inner.tau * users.prior[columns] + candidates.correction, len(columns)
    scores, deviations = prior.new_empty(chunk, num + 1), []
    for slots, targets in zip(torch.split(users.slots, chunk), torch.split(users.targets, chunk), strict=True):
        start, mine = users.start.index_select(0, slots), factors.index_select(0, targets)
        own = (start * out.index_select(0, targets)).sum(1) + users.prior.index_select(0, targets)
        logits = scores[: len(slots)]
        torch.addmm(prior, start, near, out=logits[:, :num])
        logits[:, num] = inner.tau * own
        prediction = predict(logits, columns, targets)
        expected = torch.addmm(prediction[:, -1:] * mine, prediction[:, :-1], known)
        state = inner.discount * users.state.index_select(0, slots) + inner.honest(mine, expected)
        count = users.count.index_select(0, slots) + 1
        users.keep(slots, state, count)
        deviations.append(inner.deviation(state, count, users.num_events.index_select(0, slots)))
    return torch.cat(deviations)


def sampled_user_by_user(
    inner: InnerStep, tables: tuple[Tensor, Tensor], users: Users, candidates: Candidates
) -> Tensor:
    """The same, written as one writes it for one user."""
    (out, factors), columns = tables, candidates.columns
    near, known, prior = out[columns], factors[columns], users.prior[columns]
    deviations = []
    for slot, target in zip(users.slots.tolist(), users.targets.tolist(), strict=True):
        logits = inner.tau * (near @ users.start[slot] + prior) + candidates.correction
        logits[columns == target] = -torch.inf
        own = inner.tau * (out[target] @ users.start[slot] + users.prior[target])
        prediction = torch.softmax(torch.cat([logits, own[None]]), 0)
        expected = prediction[:-1] @ known + prediction[-1] * factors[target]
        users.state[slot] = inner.discount * users.state[slot] + factors[target] - expected - inner.residual_mean
        users.count[slot] += 1
        deviations.append(deviation_of(inner, users, slot))
    return torch.stack(deviations)


def deviation_of(inner: InnerStep, users: Users, slot: int) -> Tensor:
    """A user's deviation [F] from the state in the table."""
    count = int(users.count[slot])
    weight = float(count) if inner.discount == 1 else (1 - inner.discount**count) / (1 - inner.discount)
    step = users.state[slot] / (weight * inner.metric + inner.precision) / inner.tau
    length = float(inner.tau * (step.square() @ inner.metric).sqrt())
    scale = min(1.0, inner.trust_radius / max(length, 1e-6 * inner.tau))
    return step * (scale if int(users.num_events[slot]) >= inner.step_from else 0.0)


def user_by_user(inner: InnerStep, tables: tuple[Tensor, Tensor], users: Users) -> Tensor:
    """The same, written as one writes it for one user."""
    out, factors = tables
    deviations = []
    for slot, target in zip(users.slots.tolist(), users.targets.tolist(), strict=True):
        prediction = torch.softmax(inner.tau * (out @ users.start[slot] + users.prior), 0)
        state = inner.discount * users.state[slot] + factors[target] - prediction @ factors - inner.residual_mean
        users.state[slot] = state
        users.count[slot] += 1
        deviations.append(deviation_of(inner, users, slot))
    return torch.stack(deviations)


def tasks_of(num_users: int, values: MetaParameters, device: str) -> tuple[TaskBatch, Tensor, Tensor]:
    """Users with full support sets, the priors of one epoch [B, N], and a target each."""
    draw = torch.Generator().manual_seed(2)
    num_items = len(values.item_ids)
    num_events = torch.randint(SUPPORT_SIZE, 2 * SUPPORT_SIZE, (num_users,), generator=draw)
    support = torch.randint(0, num_items, (num_users, SUPPORT_SIZE), generator=draw)
    tasks = TaskBatch(
        support=support,
        weights=torch.ones(num_users, SUPPORT_SIZE),
        num_events=num_events,
        state=torch.randn(num_users, values.item_factors.shape[1], generator=draw) * 0.1,
        state_events=num_events - 1,
        track=torch.zeros(num_users, 1),
        excluded=exclusions(support, num_items),
        prior_rows=bucket_of(num_events),
    )
    priors = torch.randn(NUM_BUCKETS, num_items, generator=draw)
    targets = torch.randint(0, num_items, (num_users,), generator=draw)
    return _mapped(tasks, lambda column: column.to(device)), priors.to(device), targets.to(device)


def in_chunks(
    ranker: Ranker, work: tuple[TaskBatch, Tensor, Tensor], chunk: int, candidates: Candidates | None = None
) -> list[Step]:
    """`Ranker.step` over all users, `chunk` at a time."""
    tasks, priors, targets = work
    steps = []
    for first in range(0, len(targets), chunk):
        rows = slice(first, first + chunk)
        now = _mapped(tasks, lambda column: column[rows])  # noqa: B023 - called at once
        near = candidates and Candidates(*(column.repeat(len(now.support), 1) for column in candidates))
        steps.append(ranker.step(now, priors, targets[rows], None, near))
    return steps


def _mapped(tasks: TaskBatch, change: Callable[[Tensor], Tensor]) -> TaskBatch:
    columns: dict[str, Any] = {name: change(column) for name, column in vars(tasks).items() if column is not None}
    return TaskBatch(**columns)


def tables_of(values: MetaParameters, items: ItemTables) -> tuple[Tensor, Tensor]:
    """Out-vectors [N, D] and inner factors [N, F]."""
    out, factors = torch.split(items.vectors, [values.item_out.shape[1], values.item_factors.shape[1]], 1)
    return out, factors


def double_ranker(values: MetaParameters, items: ItemTables) -> Ranker:
    """The ranker in float64."""

    def precise(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    tensors: dict[str, Any] = {name: precise(tensor) for name, tensor in values.tensors().items()}
    doubled = replace(values, **tensors)
    tables: dict[str, Any] = {n: precise(value) for n, value in vars(items).items() if isinstance(value, Tensor)}
    return Ranker(doubled, replace(items, **tables))


def check_step(values: MetaParameters, items: ItemTables, users: Users, device: str, *, ways: Sequence[Way]) -> float:
    """Largest difference of all ways from the first in float64, relative to the largest value. At most TOLERANCE."""
    tables = tables_of(values, items)
    precise = tables[0].double(), tables[1].double()
    reference = users.copy(torch.float64)
    expected = ways[0](inner_step(values, device, torch.float64), precise, reference)
    worst = 0.0
    for compute in ways:
        mine = users.copy()
        found = compute(inner_step(values, device), tables, mine)
        worst = max(worst, difference(found, expected), difference(mine.state, reference.state))
        assert torch.equal(mine.count, reference.count)
    assert worst <= TOLERANCE, f"the inner step is {worst:.1e} away from float64"
    return worst


def check_ranker(
    values: MetaParameters, items: ItemTables, work: tuple[TaskBatch, Tensor, Tensor], near: Candidates | None
) -> float:
    """The same for `Ranker.step`: states and losses."""
    tasks, priors, targets = work
    precise = _mapped(tasks, lambda column: column.double() if column.is_floating_point() else column)
    expected = in_chunks(double_ranker(values, items), (precise, priors.double(), targets), len(targets), near)[0]
    found = in_chunks(Ranker(values, items), work, largest_chunk(items.num_items), near)
    worst = max(
        difference(torch.cat([getattr(step, name) for step in found]), getattr(expected, name))
        for name in ("state", "loss_adapted", "loss_start")
    )
    assert worst <= TOLERANCE, f"Ranker.step is {worst:.1e} away from float64"
    return worst


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def measure(
    num_items: int,
    *,
    num_users: int,
    repeats: int,
    num_factors: int = NUM_FACTORS,
    device: str = "cpu",
    chunk: int | None = None,
) -> list[list[str]]:
    """Rows of the table for one catalogue size: users per second of this core (wall time on another device).

    As many users a call as the worker takes, or `chunk`.
    """
    chunk = chunk or largest_chunk(num_items)
    values = parameters(num_items, num_factors=num_factors)
    items = catalogue(values, device).tables
    users = draw_users(values, num_users, device)
    tables = tables_of(values, items)
    work, ranker = tasks_of(num_users, values, device), Ranker(values, items)
    few = tasks_of(max(8, num_users // 32), values, device)
    inner, one = inner_step(values, device), replace_slots(users, max(8, num_users // 32))
    near = draw(values.item_events.to(device), min(Ranker.sampling.num, num_items), turn=0)
    by_sample, by_sample_alone = partial(sampled, candidates=near), partial(sampled_user_by_user, candidates=near)
    vectors, queries = items.vectors, torch.cat([users.start, users.state], 1)[users.slots]

    def top() -> None:
        for rows in torch.split(queries, chunk):
            best_rows(rows @ vectors.T, TOP_N)

    def top_by_user() -> None:
        for row in queries[: len(one.slots)]:
            (vectors @ row).topk(TOP_N)

    cuda = device != "cpu"

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if cuda else time.process_time()

    seconds = medians(
        {
            "step": lambda: batched(inner, tables, users, chunk),
            "step, user by user": lambda: user_by_user(inner, tables, one),
            "sampled": lambda: by_sample(inner, tables, users),
            "sampled, user by user": lambda: by_sample_alone(inner, tables, one),
            "ranker": lambda: in_chunks(ranker, work, chunk),
            "ranker, user by user": lambda: in_chunks(ranker, few, 1),
            "sampled ranker": lambda: in_chunks(ranker, work, chunk, near),
            "sampled ranker, user by user": lambda: in_chunks(ranker, few, 1, near),
            "top": top,
            "top, user by user": top_by_user,
        },
        repeats=repeats,
        clock=clock,
    )
    off_step = check_step(values, items, users, device, ways=(batched, user_by_user))
    off_sampled = check_step(values, items, users, device, ways=(by_sample, by_sample_alone))
    rows = []
    for name, title, off in (
        ("step", f"inner step, whole catalogue, F {num_factors}", f"{off_step:.0e}"),
        ("sampled", f"inner step, {Ranker.sampling.num + 1} candidates, F {num_factors}", f"{off_sampled:.0e}"),
        ("ranker", "Ranker.step (start from support, losses, ranks)", f"{check_ranker(values, items, few, None):.0e}"),
        ("sampled ranker", "Ranker.step, candidates", f"{check_ranker(values, items, few, near):.0e}"),
        ("top", f"top {TOP_N}, matrix product included", "exact"),
    ):
        mine, other = num_users / seconds[name], len(one.slots) / seconds[f"{name}, user by user"]
        rows.append([title, f"{num_items:,}", f"{mine:,.0f}", f"{other:,.0f}", f"{mine / other:.1f}x", off])
    return rows


def replace_slots(users: Users, num_users: int) -> Users:
    """The first users only."""
    return replace(users, slots=users.slots[:num_users], targets=users.targets[:num_users])


COLUMNS = (
    f"work, chunks as the worker's, candidates {SAMPLED_CHUNK}",
    "items",
    "users/s",
    "user by user",
    "ratio",
    "from float64",
)


def main(options: Options) -> None:
    """Print the table."""
    one_thread()
    sizes = (
        [(300, NUM_FACTORS)] if options.quick else [(NUM_ITEMS, NUM_FACTORS), (10_000, NUM_FACTORS), (NUM_ITEMS, WIDE)]
    )
    num_users, repeats = (128, 1) if options.quick else (8192, 7)
    rows = list[list[str]]()
    for num_items, num_factors in sizes:
        rows += measure(num_items, num_users=num_users, repeats=repeats, num_factors=num_factors)
    print(table("(b) inner loop, users per CPU-second of one core (median of interleaved runs)", COLUMNS, rows))
