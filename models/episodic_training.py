"""The outer loop of a gradient-based learner: episodes, the meta-gradient, a schedule and early stopping.

An episode is a user before an event: the inner loss holds what came before it, the query is this item and the user's
next ones. The outer loss is the softmax cross-entropy of the query over the whole catalogue, as users are served.
Letters: E episodes, U of them in a batch, N catalogue items, Q query slots, F inner factors, A parameters, K steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.adapters import Adapter
from models.figures import query_ranks, set_ndcg, user_means
from models.inner_loop import InnerStep
from models.inner_losses import ABSENT, InnerLoss
from models.learners import InnerSteps, Learner

STEPS = 5
BATCH = 64
MAX_EPOCHS = 30
PATIENCE = 4  # epochs without a better validation figure after which training ends
OUTER_RATE = 0.001
_BLOCK = 256


class Episodes(NamedTuple):
    """A batch of tasks.

    Attributes:
        loss: what the inner loop descends.
        context: [U, F] for the adapter.
        start: [U, N] the start's logits now, -inf where an item may not be listed.
        query: [U, Q] rows, -1 where none.
        num_events: [U] K.
        users: [U].

    """

    loss: InnerLoss
    context: Tensor
    start: Tensor
    query: Tensor
    num_events: Tensor
    users: Tensor


class EpisodeSource(Protocol):
    """Where episodes come from; `users` [E] are theirs."""

    @property
    def users(self) -> Tensor:
        """[E] int64."""

    def episodes(self, numbers: Tensor) -> Episodes:
        """Make the episodes of these numbers [U]."""


@dataclass(frozen=True)
class Serving:
    """How a vector acts: limited as the honest step is, then `logits = start + factors @ vector`, factors [N, F]."""

    factors: Tensor
    limits: InnerStep

    def deviation(self, steps: InnerSteps, episodes: Episodes, *, second_order: bool = True) -> Tensor:
        """What is served of the users' vectors [U, F]."""
        vector = steps.vector(episodes.loss, episodes.context, second_order=second_order)
        return self.limits.limited(vector, episodes.num_events)

    def logits(self, steps: InnerSteps, episodes: Episodes, *, second_order: bool = True) -> Tensor:
        """Adapted logits [U, N]."""
        return episodes.start + self.deviation(steps, episodes, second_order=second_order) @ self.factors.T


@dataclass(frozen=True)
class Leaves:
    """What the outer loop may move: initial [A], logarithms of the rates [K, A] and of the precision [F]."""

    initial: Tensor
    log_rates: Tensor
    log_precision: Tensor

    @classmethod
    def of(cls, learner: Learner, adapter: Adapter, limits: InnerStep, generator: torch.Generator) -> Leaves:
        """Begin with equal steps that together go once down the curvature of an event; with the honest precision."""
        steps = 0 if learner.solves else STEPS
        rate = 1.0 / (limits.tau * float(limits.metric.mean().clamp(min=1e-9)) * STEPS)
        return cls(
            adapter.initial(generator),
            torch.full((steps, adapter.size), rate).log(),
            limits.precision.clone().log(),
        )

    def moved_by(self, learner: Learner) -> list[Tensor]:
        """Those that this learner learns."""
        if learner.solves:
            return [self.log_precision]
        return [self.initial, self.log_rates] if learner.learns_rates else [self.initial]

    def steps(self, learner: Learner, adapter: Adapter) -> InnerSteps:
        """The inner loop they stand for: rates are positive by construction, and zero for what does not adapt."""
        moves = torch.ones(adapter.size) if learner.adapts_body else adapter.head.to(self.initial.dtype)
        return InnerSteps(adapter, self.initial, self.log_rates.exp() * moves, self.log_precision.exp())

    def copy(self) -> Leaves:
        """The same, apart and without gradients."""
        return Leaves(*(leaf.detach().clone() for leaf in vars(self).values()))


def outer_loss(learner: Learner, steps: InnerSteps, episodes: Episodes, serving: Serving) -> Tensor:
    """The scalar whose gradient is the learner's outer gradient.

    Reptile's is `initial - adapted`: gradient descent on it at rate e is the published
    `initial + e (mean adapted - initial)`.
    """
    if learner.follows_adapted:
        adapted = steps.parameters(episodes.loss, episodes.context).detach()
        return 0.5 * (steps.initial - adapted).square().sum(1).mean()
    logits = serving.logits(steps, episodes, second_order=learner.second_order)
    # finite, so that no product of zero and infinity reaches a gradient
    logs = torch.log_softmax(serving.limits.tau * logits.clamp(min=ABSENT), 1)
    wanted = episodes.query >= 0
    taken = logs.gather(1, episodes.query.clamp(min=0)) * wanted
    return -(taken.sum(1) / wanted.sum(1).clamp(min=1)).mean()


def figures(steps: InnerSteps, source: EpisodeSource, numbers: Tensor, serving: Serving) -> tuple[Tensor, Tensor]:
    """Set nDCG@10 of episodes [E], adapted and of the start."""
    adapted, start = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for block in torch.split(numbers, _BLOCK):
            episodes = source.episodes(block)
            both = serving.logits(steps, episodes), episodes.start
            for found, logits in zip((adapted, start), both, strict=True):
                found.append(set_ndcg(query_ranks(logits, episodes.query)))
    return torch.cat(adapted), torch.cat(start)


def deviations(steps: InnerSteps, source: EpisodeSource, numbers: Tensor, serving: Serving) -> Tensor:
    """What would be served of the vectors [E, F] in episodes of these numbers."""
    with torch.no_grad():
        blocks = (source.episodes(block) for block in torch.split(numbers, _BLOCK))
        return torch.cat([serving.deviation(steps, episodes) for episodes in blocks])


class Fitted(NamedTuple):
    """The best epoch's inner loop, its figure on the stopping users, and how many epochs were run."""

    steps: InnerSteps
    figure: float
    epochs: int


def fit(
    learner: Learner,
    adapter: Adapter,
    source: EpisodeSource,
    serving: Serving,
    *,
    seed: int,
    numbers: Tensor,
    tell: Callable[[int, int], None],
) -> Fitted:
    """Fit on three of four users of episodes `numbers`, stop early by the set nDCG@10 of the fourth.

    Adam under a one-cycle schedule; a user weighs the same whatever the length of the history. The best epoch wins, and
    epoch 0, which is the inner loop before any learning, takes part.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = Leaves.of(learner, adapter, serving.limits, generator)
    learning, stopping = _split(source.users, numbers, generator)
    moved = [leaf.requires_grad_() for leaf in leaves.moved_by(learner)]
    optimiser = torch.optim.Adam(moved, lr=OUTER_RATE)
    batches = -(-len(learning) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, OUTER_RATE, total_steps=MAX_EPOCHS * batches + 1)
    best, best_figure, best_epoch, epoch = leaves.copy(), -1.0, 0, 0
    for epoch in range(MAX_EPOCHS + 1):
        figure = _mean(figures(leaves.copy().steps(learner, adapter), source, stopping, serving)[0], source, stopping)
        if figure > best_figure:
            best, best_figure, best_epoch = leaves.copy(), figure, epoch
        tell(epoch, MAX_EPOCHS)
        if epoch in (best_epoch + PATIENCE, MAX_EPOCHS):
            break
        for batch in torch.split(_by_user(source.users[learning], learning, generator), BATCH):
            optimiser.zero_grad()
            loss = outer_loss(learner, leaves.steps(learner, adapter), source.episodes(batch), serving)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(moved, 1.0)
            optimiser.step()
            schedule.step()
    return Fitted(best.steps(learner, adapter), best_figure, epoch)


def _split(users: Tensor, numbers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Episodes of three quarters of the users, and of the rest."""
    there = torch.unique(users[numbers])
    held_out = there[torch.randperm(len(there), generator=generator)[: max(1, len(there) // 4)]]
    late = torch.isin(users[numbers], held_out)
    return numbers[~late], numbers[late]


def _by_user(users: Tensor, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """As many episodes as there are, drawn so that users come equally often."""
    _, inverse, counts = torch.unique(users, return_inverse=True, return_counts=True)
    return numbers[torch.multinomial(1.0 / counts[inverse], len(numbers), replacement=True, generator=generator)]


def _mean(values: Tensor, source: EpisodeSource, numbers: Tensor) -> float:
    return float(user_means(values, source.users[numbers]).mean())
