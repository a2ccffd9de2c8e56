"""The inner loop: one MAP step from honest residuals, for all users of a batch at once.

A residual is honest when it is the error of a prediction made before the event by the start alone:
`g_t = f(item_t) - E_p[f]` under `p = softmax(tau * start)`. Refitting what the start has already used learns nothing.
With the metric shared by all users and diagonal (its eigenbasis), a user's state is one vector and one count:

    state_t = discount * state_{t-1} + g_t - mean residual
    deviation = state / (weight(count) * metric + precision) / tau

which is the maximum a posteriori Newton step of a softmax model with a Gaussian prior (Laplace approximation).
Letters: U users, N catalogue items, F inner factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIVERGED = 1000.0  # trust radii; honest residuals of any length of history stay far below


@dataclass(frozen=True)
class InnerStep:
    """The learnt constants of the step; metric, precision and residual_mean are [F]."""

    metric: Tensor
    precision: Tensor
    residual_mean: Tensor
    tau: float
    discount: float
    trust_radius: float
    step_from: int

    def weight(self, state_events: Tensor) -> Tensor:
        """Discounted number of residuals [U] (float32) in a state of `state_events` [U] residuals."""
        if self.discount == 1.0:
            return state_events.to(self.metric.dtype)
        # in double precision, since a power in single rounds differently at different places of a batch
        left = torch.pow(self.discount, state_events.double())
        return ((1.0 - left) / (1.0 - self.discount)).to(self.metric.dtype)

    def deviation(self, state: Tensor, state_events: Tensor, num_events: Tensor) -> Tensor:
        """Change of the user's factors [U, F], limited to the trust region; zero before `step_from` positives."""
        return self.limited(self._step(state, state_events), num_events)

    def sound(self, state: Tensor, state_events: Tensor) -> Tensor:
        """Whether states [U, F] are finite and their steps no longer than DIVERGED trust radii: [U] bool."""
        return self._length(self._step(state, state_events)) <= DIVERGED * self.trust_radius  # false for NaN

    def limited(self, step: Tensor, num_events: Tensor) -> Tensor:
        """Shorten a change of factors [U, F] to the trust region; zero before `step_from` positives (num_events [U]).

        The length is measured by the shared metric: `tau * sqrt(step' metric step)` is the standard deviation of the
        change of `tau * logits` under the start's prediction. A step that is not finite changes nothing.
        """
        length = self._length(step)
        scale = (self.trust_radius / length).clamp(max=1.0)
        moves = (num_events >= self.step_from) & torch.isfinite(length)
        return torch.where(moves[:, None], step * scale[:, None], 0.0)

    def residual(self, prediction: Tensor, factors: Tensor, targets: Tensor) -> Tensor:
        """Honest residual [U, F] of the start's prediction [U, N] (a distribution) at targets [U] (rows of factors).

        The mean over users is taken off: the start errs alike for everybody, and only the rest says who a user is.
        """
        return self.honest(factors.index_select(0, targets), prediction @ factors)

    def honest(self, factors: Tensor, expected: Tensor) -> Tensor:
        """Honest residual [U, F] of an item's factors [U, F] against the expected ones [U, F]."""
        return factors - expected - self.residual_mean

    def _step(self, state: Tensor, state_events: Tensor) -> Tensor:
        return state / (self.weight(state_events)[:, None] * self.metric + self.precision) / self.tau

    def _length(self, step: Tensor) -> Tensor:
        return self.tau * (step.square() * self.metric).sum(1).clamp(min=1e-12).sqrt()
