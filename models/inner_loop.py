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
        count = state_events.to(self.metric.dtype)
        if self.discount == 1.0:
            return count
        return (1.0 - torch.pow(self.discount, count)) / (1.0 - self.discount)

    def deviation(self, state: Tensor, state_events: Tensor, num_events: Tensor) -> Tensor:
        """Change of the user's factors [U, F], limited to the trust region; zero before `step_from` positives."""
        step = state / (self.weight(state_events)[:, None] * self.metric + self.precision) / self.tau
        return self.limited(step, num_events)

    def limited(self, step: Tensor, num_events: Tensor) -> Tensor:
        """Shorten a change of factors [U, F] to the trust region; zero before `step_from` positives (num_events [U]).

        The length is measured by the shared metric: `tau * sqrt(step' metric step)` is the standard deviation of the
        change of `tau * logits` under the start's prediction.
        """
        length = self.tau * (step.square() * self.metric).sum(1).clamp(min=1e-12).sqrt()
        scale = (self.trust_radius / length).clamp(max=1.0)
        scale = torch.where(num_events >= self.step_from, scale, torch.zeros_like(scale))
        return step * scale[:, None]

    def residual(self, prediction: Tensor, factors: Tensor, targets: Tensor) -> Tensor:
        """Honest residual [U, F] of the start's prediction [U, N] (a distribution) at targets [U] (rows of factors).

        The mean over users is taken off: the start errs alike for everybody, and only the rest says who a user is.
        """
        return factors[targets] - prediction @ factors - self.residual_mean

    def learn(self, state: Tensor, residual: Tensor) -> Tensor:
        """State [U, F] after one more residual [U, F]."""
        return self.discount * state + residual


States = tuple[Tensor, Tensor]  # vectors [U, F] and numbers of residuals in them [U]


def carry(
    step: InnerStep, states: States, residual: Tensor, known: Tensor, previous: Tensor | None = None
) -> tuple[States, States]:
    """States before and after every event; elementwise, so that cutting a log into calls changes no bit.

    Args:
        step: what learns.
        states: before the first event of each user in this call.
        residual: [U, F] of each event.
        known: [U] bool, whether the event teaches anything; if not, the state is handed on.
        previous: [U] row of the same user's event before, -1 = none in this call. Raises ValueError where that row
            does not come earlier.

    """
    state, counts = states
    if previous is None or not bool((previous >= 0).any()):
        after = torch.where(known[:, None], step.learn(state, residual), state)
        return states, (after, counts + known)
    turns, counts = _turns(previous.tolist(), counts, known)
    order = torch.tensor([row for turn in turns for row in turn], device=state.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=state.device)
    discount, gain = torch.where(known, step.discount, 1.0), torch.where(known[:, None], residual, 0.0)
    before, after = state[order], torch.empty_like(state)
    columns = before, after, discount[order, None], gain[order], place[previous[order]]
    sizes = [len(turn) for turn in turns]
    for turn, (had, gets, *learnt, earlier) in enumerate(
        zip(*(torch.split(column, sizes) for column in columns), strict=True)
    ):
        if turn:
            torch.index_select(after, 0, earlier, out=had)
        torch.mul(had, learnt[0], out=gets).add_(learnt[1])  # `step.learn` where it is known, else the same
    return (before[place], counts), (after[place], counts + known)


def _turns(previous: list[int], counts: Tensor, known: Tensor) -> tuple[list[list[int]], Tensor]:
    """Rows in turns, each of which needs turns before it only, and the number of residuals before every event [U]."""
    numbers, teaches = counts.tolist(), known.tolist()
    turn_of, turns = list[int](), list[list[int]]()
    for row, earlier in enumerate(previous):
        if earlier >= row:
            raise ValueError(f"row {row} follows row {earlier}: a user's events must be oldest first")
        turn = 0
        if earlier >= 0:
            turn, numbers[row] = turn_of[earlier] + 1, numbers[earlier] + teaches[earlier]
        turn_of.append(turn)
        if turn == len(turns):
            turns.append([])
        turns[turn].append(row)
    return turns, torch.tensor(numbers, device=counts.device)
