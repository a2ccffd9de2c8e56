"""What the ranker takes and gives, for all users of a batch at once.

Letters: U users, S support slots, N catalogue items, D item-item dimensions, F inner factors, L bonus slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.neighbours import Neighbours


@dataclass
class TaskBatch:
    """Users before an event; every row stands alone, padding rows have support -1 and num_events 0.

    Attributes:
        support: [U, S] int64 catalogue rows, newest last, right-aligned, -1 where none.
        weights: [U, S] float32 weight of each positive; not read where support is -1.
        num_events: [U] int64 K, positives so far (may exceed S).
        state: [U, F] float32 inner state.
        state_events: [U] int64 residuals in the state.
        track: [U, M] float32 what the adapter has earned lately, see `models.gate`, then what each memory but the first
            has, see `models.memories`; M = 1 where there is one memory.
        excluded: [U, N] float32 what is added to the logits: -inf for items not to be listed, else 0.
        prior_rows: [U] int64 row of the priors.
        neighbours: the pairs as they are now; None for those that the version brought.

    """

    support: Tensor
    weights: Tensor
    num_events: Tensor
    state: Tensor
    state_events: Tensor
    track: Tensor
    excluded: Tensor
    prior_rows: Tensor
    neighbours: Neighbours | None = None

    def taken(self, rows: Tensor | slice | list[int]) -> TaskBatch:
        """Give the tasks of these rows, in their order."""
        columns: dict[str, Any] = {name: column[rows] for name, column in vars(self).items() if name != "neighbours"}
        if self.neighbours is not None:
            columns["neighbours"] = self.neighbours._replace(first=self.neighbours.first[rows])
        return TaskBatch(**columns)


def exclusions(rows: Tensor, num_items: int) -> Tensor:
    """`TaskBatch.excluded` [U, N] from catalogue rows [U, X], -1 where none."""
    padded = torch.zeros(len(rows), num_items + 1, device=rows.device)
    return padded.scatter_(1, torch.where(rows >= 0, rows, num_items), -torch.inf)[:, :num_items]


class Served(NamedTuple):
    """The served form: vectors [U, D] and [U, F], prior weight [U], bonus items [U, L] (N where none), bonus [U, L]."""

    start: Tensor
    deviation: Tensor
    prior_weight: Tensor
    bonus_items: Tensor
    bonus: Tensor

    @property
    def q(self) -> Tensor:
        """[U, D + F], start and deviation side by side."""
        return torch.cat([self.start, self.deviation], 1)


class Step(NamedTuple):
    """What an event taught [U, …]: losses are capped; a rank of 0 says the item had no row (nothing was learnt).

    "Adapted" is what was served: where the gate was closed, the start.
    """

    state: Tensor
    state_events: Tensor
    track: Tensor
    loss_adapted: Tensor
    loss_start: Tensor
    rank_adapted: Tensor
    rank_start: Tensor
    rank_popular: Tensor


class Top(NamedTuple):
    """Best items [U, k] int64 (-1 past the last) and their calibrated logits [U, k] (-inf past the last).

    use: [U] int64 whether the adapter made them, `models.gate.UNUSED` … `DIVERGED`.
    """

    items: Tensor
    logits: Tensor
    use: Tensor

    def of(self, num: int) -> Top:
        """The first users' lists."""
        return Top(self.items[:num], self.logits[:num], self.use[:num])
