"""Episodes of a replayed stream: what an inner loop may know before each event, and what came after.

Letters: E events of the replay, U of them in a batch, N items, F inner factors, S support slots, G predictions,
C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.adapters import context_of
from models.episodes import History, Interactions
from models.episodic_training import Episodes
from models.inner_losses import CrossEntropy, HonestQuadratic, InnerLoss
from models.ranker import Ranker
from models.replay import Replay, epochs, honest_residuals, states_before, tasks_before

_CHUNK = 64


@dataclass(frozen=True)
class ReplayedEpisodes:
    """Every event of a replay as an episode.

    Attributes:
        replay: predictions of the start, E events.
        context: [E, F].
        loss: of the events of these numbers [U].

    """

    replay: Replay
    context: Tensor
    loss: Callable[[Tensor], InnerLoss]

    @property
    def users(self) -> Tensor:
        """[E]."""
        return self.replay.users

    def episodes(self, numbers: Tensor) -> Episodes:
        """Gather."""
        replay = self.replay
        columns = (replay.start, replay.query, replay.num_events, replay.users)
        return Episodes(self.loss(numbers), self.context[numbers], *(column[numbers] for column in columns))


def honest_episodes(ranker: Ranker, interactions: Interactions, replay: Replay) -> ReplayedEpisodes:
    """Inner losses from the states that a worker would hold before each event."""
    step, factors = ranker.inner_step, ranker.items.vectors[:, -ranker.state_size :]
    residuals = honest_residuals(replay, factors, step.tau) - step.residual_mean
    state, count = states_before(replay.users, residuals, step.discount)
    weight = step.weight(count)

    def loss(numbers: Tensor) -> InnerLoss:
        return HonestQuadratic(state[numbers], weight[numbers], step.metric, step.tau)

    return ReplayedEpisodes(replay, _contexts(ranker, interactions, replay), loss)


def candidate_episodes(
    ranker: Ranker, interactions: Interactions, replay: Replay, *, first: int, honest: bool
) -> ReplayedEpisodes:
    """Inner losses over candidates as `Ranker.candidate_loss` makes them; the replay began at event `first`."""
    losses = list[CrossEntropy]()
    for now, side in epochs(ranker, interactions, first):
        for chunk in torch.split(now[torch.isin(now, replay.events)], _CHUNK):
            if len(chunk):
                losses.append(ranker.candidate_loss(side.tasks_before(chunk), side.priors, honest=honest))
    vectors, offset, target = (
        torch.cat(columns) for columns in zip(*(vars(one).values() for one in losses), strict=True)
    )

    def loss(numbers: Tensor) -> InnerLoss:
        return CrossEntropy(vectors[numbers], offset[numbers], target[numbers])

    return ReplayedEpisodes(replay, _contexts(ranker, interactions, replay), loss)


def _contexts(ranker: Ranker, interactions: Interactions, replay: Replay) -> Tensor:
    history, factors = History.of(interactions.users), ranker.items.vectors[:, -ranker.state_size :]
    tasks = (tasks_before(ranker, interactions, history, chunk) for chunk in torch.split(replay.events, _CHUNK))
    return torch.cat([context_of(factors, one.support, one.weights) for one in tasks])
