"""(f) Meta-learners and adapters: what an inner loop and a meta-step cost, and what learners are worth on the stream.

* The inner loop: five gradient steps, D 64, ten positives and forty negatives, the gather included; beside the same by
  autograd user by user, and beside `torch.func.vmap` of the same over all users at once.
* The meta-step: the second-order meta-gradient of 64 tasks, beside autograd through autograd task by task.
* Learners side by side, as served: `learner_table`.

Ours run in fixed chunks of 64 users with a padded tail, so that one compiled graph serves any number; rows are gathered
eagerly, outside it. Letters: U users, C candidates, F factors, K steps, A parameters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad, vmap

from models.adapters import ADAPTERS, adapter_named
from models.inner_losses import CrossEntropy
from models.learners import PRIOR_EVENTS, InnerSteps
from tests.benchmarks import learner_table
from tests.benchmarks.inner_step import difference
from tests.benchmarks.measuring import medians, table
from tests.benchmarks.scene import NUM_ITEMS, Options, one_thread

POSITIVES, NEGATIVES, STEPS, FACTORS = 10, 40, 5, 64
TOLERANCE = 1e-6
Loop = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

CHUNK = 64


@dataclass(frozen=True)
class Work:
    """Users with candidates of a table [N, F]; rows [U, C], offset and target [U, 1, C], context [U, F]."""

    steps: InnerSteps
    factors: Tensor
    rows: Tensor
    offset: Tensor
    target: Tensor
    context: Tensor

    def first(self, num: int) -> Work:
        """The first users only."""
        columns = {name: getattr(self, name)[:num] for name in ("rows", "offset", "target", "context")}
        return replace(self, **columns)

    def double(self) -> Work:
        """The same in float64."""
        steps = replace(self.steps, **{name: getattr(self.steps, name).double() for name in ("initial", "rates")})
        columns = {name: getattr(self, name).double() for name in ("factors", "offset", "target", "context")}
        return replace(self, steps=steps, **columns)


def draw_work(adapter: str, num_users: int, device: str = "cpu") -> Work:
    """Random users."""
    draw, made = torch.Generator().manual_seed(0), adapter_named(adapter, FACTORS)
    initial = made.initial(draw) + 0.1 * torch.randn(made.size, generator=draw)
    rates = 20.0 * (0.5 + torch.rand(STEPS, made.size, generator=draw))
    target = torch.zeros(num_users, 1, POSITIVES + NEGATIVES)
    target[:, :, :POSITIVES] = torch.rand(num_users, 1, POSITIVES, generator=draw) + 0.5
    return Work(
        InnerSteps(made, initial.to(device), rates.to(device), torch.ones(FACTORS, device=device)),
        (torch.randn(NUM_ITEMS, FACTORS, generator=draw) / FACTORS**0.5).to(device),
        torch.randint(0, NUM_ITEMS, (num_users, POSITIVES + NEGATIVES), generator=draw).to(device),
        torch.randn(num_users, 1, POSITIVES + NEGATIVES, generator=draw).to(device),
        target.to(device),
        torch.nn.functional.normalize(torch.randn(num_users, FACTORS, generator=draw), dim=1).to(device),
    )


def inner_loop(steps: InnerSteps) -> Loop:
    """The loop over gathered candidates [U, C, F]: what is compiled."""

    def loop(vectors: Tensor, offset: Tensor, target: Tensor, context: Tensor) -> Tensor:
        return steps.vector(CrossEntropy(vectors, offset, target), context)

    return loop


def in_chunks(loop: Loop, work: Work) -> Tensor:
    """Vectors [U, F], CHUNK users at a time, the last ones padded; one buffer takes the gathered rows."""
    num_users, num_candidates = work.rows.shape
    buffer = work.factors.new_empty(CHUNK * num_candidates, work.factors.shape[1])
    found = []
    for first in range(0, num_users, CHUNK):
        rows, *columns = (
            _padded(column[first : first + CHUNK]) for column in (work.rows, work.offset, work.target, work.context)
        )
        torch.index_select(work.factors, 0, rows.flatten(), out=buffer)
        found.append(loop(buffer.view(CHUNK, num_candidates, -1), *columns))
    return torch.cat(found)[:num_users]


def _padded(column: Tensor) -> Tensor:
    missing = CHUNK - len(column)
    return torch.cat([column, column.new_zeros(missing, *column.shape[1:])]) if missing else column


def _user_loss(work: Work) -> Callable[..., Tensor]:
    """The inner loss of one user by her parameters [A], as one writes it for autograd: a mean with a prior."""
    adapter = work.steps.adapter

    def loss(theta: Tensor, vectors: Tensor, offset: Tensor, target: Tensor, context: Tensor) -> Tensor:
        logits = offset[0] + vectors @ adapter.collapse(theta[None], context[None])[0]
        total = -(target[0] * torch.log_softmax(logits, 0)).sum()
        return total / (target.sum() + PRIOR_EVENTS)

    return loss


def user_by_user(work: Work) -> Tensor:
    """Vectors [U, F] by autograd, one user after the other."""
    loss, found = _user_loss(work), []
    for user, rows in enumerate(work.rows):
        data = work.factors[rows], work.offset[user], work.target[user], work.context[user]
        theta = work.steps.initial
        for rate in work.steps.rates:
            theta = theta.detach().requires_grad_()
            theta = theta - rate * torch.autograd.grad(loss(theta, *data), theta)[0]
        found.append(work.steps.adapter.collapse(theta.detach()[None], work.context[user][None]))
    return torch.cat(found)


def by_vmap(work: Work) -> Tensor:
    """Vectors [U, F] by `torch.func`, all users at once: larger batches suit it better."""
    slope: Callable[..., Tensor] = grad(_user_loss(work))

    def one(vectors: Tensor, offset: Tensor, target: Tensor, context: Tensor) -> Tensor:
        theta = work.steps.initial
        for rate in work.steps.rates:
            theta = theta - rate * slope(theta, vectors, offset, target, context)
        return work.steps.adapter.collapse(theta[None], context[None])[0]

    many: Callable[..., Tensor] = vmap(one)
    return many(work.factors[work.rows], work.offset, work.target, work.context)


def compiled(loop: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """The loop as one graph; None, and a line that says why, where there is no C++ compiler for the CPU."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) or shutil.which("clang++"):
        made: Callable[..., Tensor] = torch.compile(loop, dynamic=False)
        return made
    print(f"not compiled: torch.compile needs a C++ compiler, and {compiler} (CXX) is not there; the loop runs eagerly")
    return None


def measure_loop(adapter: str, *, num_users: int, repeats: int, with_compiler: bool) -> list[str]:
    """A row: users per CPU-second."""
    work, few = draw_work(adapter, num_users), max(8, num_users // 64)
    eager = inner_loop(work.steps)
    graph = compiled(eager) if with_compiler else None
    expected = user_by_user(work.first(few).double())
    ways: dict[str, Callable[[], Tensor]] = {"eager": lambda: in_chunks(eager, work), "vmap": lambda: by_vmap(work)}
    if graph:
        ways["compiled"] = lambda: in_chunks(graph, work)
    worst = max(difference(way()[:few], expected) for way in ways.values())
    assert worst <= TOLERANCE, f"the inner loop is {worst:.1e} away from float64"
    ways["by user"] = lambda: user_by_user(work.first(few))
    seconds = medians(ways, repeats=repeats)
    best = min(("compiled", "eager"), key=lambda name: seconds.get(name, float("inf")))
    rates = {name: (few if name == "by user" else num_users) / taken for name, taken in seconds.items()}
    return [
        adapter,
        *(f"{rates[name]:,.0f}" if name in rates else "-" for name in ("compiled", "eager", "vmap", "by user")),
        f"{rates[best] / rates['by user']:.0f}x",
        f"{rates[best] / rates['vmap']:.1f}x",
        f"{worst:.0e}",
    ]


def outer(steps: InnerSteps, support: CrossEntropy, query: CrossEntropy, context: Tensor) -> Tensor:
    """The outer loss: cross-entropy of the query after the inner loop."""
    return query.value(steps.vector(support, context)).mean()


def measure_meta_step(adapter: str, *, tasks: int, repeats: int, with_compiler: bool) -> list[str]:
    """A row: milliseconds of the second-order meta-gradient of `tasks` tasks, the gathers included."""
    work, query = draw_work(adapter, tasks), draw_work(adapter, tasks)

    def batched(step: Callable[..., Tensor], asked: Work) -> Tensor:
        initial = asked.steps.initial.clone().requires_grad_()
        sides = [
            CrossEntropy(asked.factors[rows], offset.to(asked.offset), target.to(asked.target))
            for rows, offset, target in (
                (asked.rows, asked.offset, asked.target),
                (query.rows.flip(0), query.offset.flip(0), query.target.flip(0)),
            )
        ]
        loss = step(replace(asked.steps, initial=initial), *sides, asked.context)
        return torch.autograd.grad(loss, initial)[0]

    graph = compiled(outer) if with_compiler else None
    expected = meta_gradient_by_task(work.double(), query.double())
    ways: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: batched(outer, work),
        "by task": lambda: meta_gradient_by_task(work, query),
    }
    if graph:
        ways["compiled"] = lambda: batched(graph, work)
    worst = max(difference(way(), expected) for way in ways.values())
    assert worst <= TOLERANCE, f"the meta-gradient is {worst:.1e} away from float64"
    seconds = medians(ways, repeats=repeats)
    best = min(seconds[name] for name in ("compiled", "eager") if name in seconds)
    shown = (f"{1000 * seconds[name]:.1f}" if name in seconds else "-" for name in ("compiled", "eager", "by task"))
    return [adapter, *shown, f"{seconds['by task'] / best:.0f}x", f"{worst:.0e}"]


def meta_gradient_by_task(work: Work, query: Work) -> Tensor:
    """The same by autograd through autograd, task by task."""
    loss, total = _user_loss(work), torch.zeros_like(work.steps.initial)
    num = len(work.rows)
    for task in range(num):
        initial = work.steps.initial.clone().requires_grad_()
        data = work.factors[work.rows[task]], work.offset[task], work.target[task], work.context[task]
        theta = initial
        for rate in work.steps.rates:
            theta = theta - rate * torch.autograd.grad(loss(theta, *data), theta, create_graph=True)[0]
        other = num - 1 - task
        asked = work.factors[query.rows[other]], query.offset[other], query.target[other], work.context[task]
        mean = loss(theta, *asked) * (query.target[other].sum() + PRIOR_EVENTS)
        total += torch.autograd.grad(mean, initial)[0]
    return total / num


def main(options: Options) -> None:
    """Print the tables."""
    one_thread()
    quick = options.quick
    num_users, repeats = (256, 1) if quick else (4096, 7)
    loops = [measure_loop(name, num_users=num_users, repeats=repeats, with_compiler=not quick) for name in ADAPTERS]
    heads = ["adapter", "compiled", "eager", "vmap", "user by user", "ratio", "to vmap", "from float64"]
    print(table("(f) inner loop, 5 steps, D 64, 10 + 40, gather included: users per CPU-second", heads, loops))
    tasks = 8 if quick else 64
    steps = [measure_meta_step(name, tasks=tasks, repeats=repeats, with_compiler=not quick) for name in ADAPTERS]
    heads = ["adapter", "compiled", "eager", "task by task", "ratio", "from float64"]
    print(table(f"second-order meta-gradient, {tasks} tasks: CPU ms", heads, steps))
    learner_table.main(options)
