"""The inner loss as a cross-entropy over a user's newest positives and a version's negatives.

Two kinds of offset are offered. `events`: each positive is predicted by what the start gave *before* it, from the
support set as it was then, so the residuals are honest. `support`: all of them by what the start gives now, although it
has used them already; that is what is usually done, and what honest residuals are compared with.

Letters: U users, S support slots, G predictions, W newest positives, M negatives, C = W + M candidates, N items,
F factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.inner_losses import ABSENT, CrossEntropy
from models.popularity import bucket_of

if TYPE_CHECKING:
    from models.tasks import TaskBatch

NUM_POSITIVES = 10
NUM_NEGATIVES = 40
_POWER = 0.75


class Negatives(NamedTuple):
    """Catalogue rows [M] drawn once per version, and [M] minus the logarithm of their chance to be drawn."""

    rows: Tensor
    correction: Tensor


def draw_negatives(events: Tensor, num: int = NUM_NEGATIVES) -> Negatives:
    """Draw by events ** 0.75 from item events [N]: systematically, so that a version always draws the same.

    With the correction a sum over the negatives estimates the sum over the catalogue.
    """
    weight = events.double() ** _POWER
    chance = (num * weight / weight.sum().clamp(min=1e-9)).clamp(max=1.0)
    passed = torch.floor(torch.cumsum(chance, 0) + 0.5)
    drawn = torch.diff(passed, prepend=passed.new_zeros(1)) > 0
    rows = drawn.nonzero()[:, 0]
    return Negatives(rows, -torch.log(chance[rows]).to(torch.float32))


def candidate_loss(
    start: Callable[[TaskBatch], Tensor],
    tasks: TaskBatch,
    negatives: Negatives,
    factors: Tensor,
    *,
    tau: float,
    honest: bool,
) -> CrossEntropy:
    """Build the loss of U users; `start` gives the logits [X, N] of X tasks, nothing excluded; factors are [N, F].

    A negative does not compete for a user who has had it. `honest` chooses `events`, otherwise `support`.
    """
    num_users, newest = len(tasks.support), min(NUM_POSITIVES, tasks.support.shape[1])
    positives, weights = tasks.support[:, -newest:], tasks.weights[:, -newest:]
    there = positives >= 0
    had = (tasks.support[:, :, None] == negatives.rows).any(1)
    rows = torch.cat([positives.clamp(min=0), negatives.rows.expand(num_users, -1)], 1)
    logits = start(_as_it_was(tasks, newest) if honest else tasks).view(num_users, -1, len(factors))
    num_predictions = logits.shape[1]
    offset = tau * logits.gather(2, rows[:, None].expand(-1, num_predictions, -1))
    offset[:, :, newest:] += negatives.correction
    own = torch.eye(newest, dtype=torch.bool, device=rows.device) if honest else there.new_ones(1, newest)
    truth = own & there[:, None]
    competes = torch.cat([truth, ~had[:, None].expand(-1, num_predictions, -1)], 2)
    target = torch.where(truth, weights[:, None], 0.0)
    present = torch.cat([there, ~had], 1)
    return CrossEntropy(
        torch.where(present[:, :, None], tau * factors[rows], 0.0),
        torch.where(competes, offset, ABSENT),
        torch.nn.functional.pad(target, (0, len(negatives.rows))),
    )


def _as_it_was(tasks: TaskBatch, newest: int) -> TaskBatch:
    """The tasks before each of their `newest` positives, oldest first: [U * W, …]."""
    ages = torch.arange(newest, 0, -1, device=tasks.support.device)
    num_events = (tasks.num_events[:, None] - ages).clamp(min=0)
    # a row of priors is a partition's block and a bucket of K
    prior_rows = (tasks.prior_rows - bucket_of(tasks.num_events))[:, None] + bucket_of(num_events)

    def shifted(columns: Tensor, value: int) -> Tensor:
        padded = torch.nn.functional.pad(columns, (newest, 0), value=value)
        return padded.unfold(1, columns.shape[1], 1)[:, :newest].flatten(0, 1)

    return replace(
        tasks,
        support=shifted(tasks.support, -1),
        weights=shifted(tasks.weights, 0),
        num_events=num_events.flatten(),
        prior_rows=prior_rows.flatten(),
        neighbours=tasks.neighbours.repeated(newest) if tasks.neighbours else None,
    )
