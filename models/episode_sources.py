"""Episodes of a replayed stream: what an inner loop may know before each event, and what came after.

Letters: E events of the replay, U of them in a batch, N items, F inner factors, S support slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.adapters import context_of
from models.episodic_training import Episodes
from models.inner_loop import InnerStep
from models.inner_losses import HonestQuadratic
from models.ranker import TaskBatch
from models.replay import Replay, honest_residuals, states_before


@dataclass(frozen=True)
class HonestEpisodes:
    """Episodes on honest residuals: the state that a worker would hold before each event.

    Attributes:
        replay: predictions of the start, E events.
        context: [E, F].
        state: [E, F] discounted sum of honest residuals before the event.
        weight: [E] discounted number of them.
        step: metric and temperature.

    """

    replay: Replay
    context: Tensor
    state: Tensor
    weight: Tensor
    step: InnerStep

    @classmethod
    def of(cls, replay: Replay, tasks: TaskBatch, factors: Tensor, step: InnerStep) -> HonestEpisodes:
        """Scan the residuals for factors [N, F]; `tasks` [E] are those before the events."""
        residuals = honest_residuals(replay, factors, step.tau) - step.residual_mean
        state, count = states_before(replay.users, residuals, step.discount)
        return cls(replay, context_of(factors, tasks.support, tasks.weights), state, step.weight(count), step)

    @property
    def users(self) -> Tensor:
        """[E]."""
        return self.replay.users

    def episodes(self, numbers: Tensor) -> Episodes:
        """Gather."""
        replay = self.replay
        return Episodes(
            HonestQuadratic(self.state[numbers], self.weight[numbers], self.step.metric, self.step.tau),
            self.context[numbers],
            replay.start[numbers],
            replay.query[numbers],
            replay.num_events[numbers],
            replay.users[numbers],
        )
