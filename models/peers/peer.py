"""What every peer is asked: scores of all items for users of whom a history is known; then what came next.

Letters: U users, H history slots, N items, E events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

_ADDED = 16  # a row that is looked up and added costs as much as so many that a dense product multiplies


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

    def summed(self, said: Callable[[Tensor], Tensor], decay: float) -> Tensor:
        """Sum of decay^age over a user's events of what each item says of all: [U, N].

        `said` gives the rows [R, N] of some items [R]; only those are asked for that anybody had.
        """
        present = self.history >= 0
        had: Tensor = torch.unique(self.history[present])
        table = said(had)
        places = torch.where(present, torch.searchsorted(had, self.history), -1)
        user, slot = present.nonzero(as_tuple=True)
        if len(user) * _ADDED > len(places) * len(had):
            return Known(places, self.num_events).weighted(len(had), decay) @ table
        first = torch.searchsorted(user, torch.arange(len(places)))
        gains = decay ** (places.shape[1] - 1 - slot).to(table.dtype)
        return functional.embedding_bag(places[user, slot], table, first, mode="sum", per_sample_weights=gains)

    def select(self, rows: Tensor) -> Known:
        """Keep some users."""
        return Known(self.history[rows], self.num_events[rows])


class Peer(Protocol):
    """One recommender, fitted when it was made."""

    def scores(self, known: Known) -> Tensor:
        """Scores [U, N] before the users' next event, comparable within a user."""

    def learn(self, known: Known, items: Tensor) -> None:
        """Take in what came next for these users: items [U], in time order; a user may come several times."""
