"""What every peer is asked: scores of all items for users of whom a history is known; then what came next.

Letters: U users, H history slots, N items, E events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Known:
    """Users before an event: histories [U, H] of item rows, newest last, -1 where none, and K [U] (may exceed H)."""

    history: Tensor
    num_events: Tensor

    def had(self, num_items: int) -> Tensor:
        """1.0 where a user has had an item: [U, N]."""
        return self.weighted(num_items, 1.0).clamp(max=1.0)

    def weighted(self, num_items: int, decay: float) -> Tensor:
        """Sum of decay^age over a user's events with each item, age 0 being the newest: [U, N]."""
        ages = torch.arange(self.history.shape[1] - 1, -1, -1, dtype=torch.float32)
        gains = torch.where(self.history >= 0, decay**ages, 0.0)
        empty = torch.zeros(len(self.history), num_items)
        return empty.scatter_add_(1, self.history.clamp(min=0), gains)

    def items(self) -> Tensor:
        """What anybody had [R], ascending."""
        found: Tensor = torch.unique(self.history[self.history >= 0])
        return found

    def numbered(self, items: Tensor) -> Known:
        """The same users with histories as places in `items` [R], ascending."""
        return Known(torch.where(self.history >= 0, torch.searchsorted(items, self.history), -1), self.num_events)

    def summed(self, table: Tensor, decay: float) -> Tensor:
        """`weighted @ table` [U, N] for a table [R, N] of what items say of others, without the product's zeros."""
        user, slot = (self.history >= 0).nonzero(as_tuple=True)
        first = torch.searchsorted(user, torch.arange(len(self.history)))
        gains = decay ** (self.history.shape[1] - 1 - slot).to(table.dtype)
        rows = self.history[user, slot]
        return functional.embedding_bag(rows, table, first, mode="sum", per_sample_weights=gains)

    def select(self, rows: Tensor) -> Known:
        """Keep some users."""
        return Known(self.history[rows], self.num_events[rows])


class Peer(Protocol):
    """One recommender, fitted when it was made."""

    def scores(self, known: Known) -> Tensor:
        """Scores [U, N] before the users' next event, comparable within a user."""

    def learn(self, known: Known, items: Tensor) -> None:
        """Take in what came next for these users: items [U], in time order; a user may come several times."""
