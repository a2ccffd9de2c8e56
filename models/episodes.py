"""Users' ordered events as tasks: what stood before each event, and which items came after it.

Letters: E events, U users, S support slots, N items, Q query slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interactions:
    """Positive events in time order (ties already broken), one row per event.

    Attributes:
        users: [E] int64, any numbering.
        items: [E] int64 rows 0..num_items-1.
        times: [E] int64 milliseconds, ascending.
        weights: [E] float32 positive.
        num_items: N.

    """

    users: Tensor
    items: Tensor
    times: Tensor
    weights: Tensor
    num_items: int

    def select(self, mask: Tensor) -> Interactions:
        """Keep the events of a mask [E] (or of ascending indices)."""
        return Interactions(self.users[mask], self.items[mask], self.times[mask], self.weights[mask], self.num_items)

    def __len__(self) -> int:
        """E."""
        return len(self.users)


@dataclass(frozen=True)
class History:
    """The events of `Interactions` sorted by user, then time, with positions.

    Attributes:
        order: [E] event numbers by (user, time).
        place: [E] place of each event in `order` (its inverse).
        position: [E] by event number: K, the user's earlier events.
        length: [E] by event number: all events of that user.

    """

    order: Tensor
    place: Tensor
    position: Tensor
    length: Tensor

    @classmethod
    def of(cls, users: Tensor) -> History:
        """Sort events by user; ties keep their order."""
        order = torch.argsort(users, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        _, inverse, counts = torch.unique(users, return_inverse=True, return_counts=True)
        first = torch.cumsum(counts, 0) - counts
        return cls(order, place, place - first[inverse], counts[inverse])


def drawn_from(mask: Tensor, most: int, seed: int) -> Tensor:
    """At most so many of the events of a mask [all events], at random: a mask again."""
    events = mask.nonzero()[:, 0]
    order = torch.randperm(len(events), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros_like(mask)
    drawn[events[order[:most]]] = True
    return drawn


def earlier(history: History, values: Tensor, events: Tensor, num: int) -> Tensor:
    """The user's `num` values before each of `events` [U]: [U, num], newest last, right-aligned, -1 where none."""
    offset = torch.arange(-num, 0)
    place = history.place[events][:, None] + offset
    found = values[history.order[place.clamp(min=0)]]
    return torch.where(history.position[events][:, None] + offset >= 0, found, torch.full_like(found, -1))


def following(history: History, values: Tensor, events: Tensor, num: int) -> Tensor:
    """The user's `num` values from each of `events` [U] on, its own first: [U, num], -1 where none.

    They are a set: what comes again in it is -1 as well.
    """
    offset = torch.arange(num)
    place = history.place[events][:, None] + offset
    found = values[history.order[place.clamp(max=len(history.order) - 1)]]
    inside = history.position[events][:, None] + offset < history.length[events][:, None]
    again = (found[:, :, None] == found[:, None, :]).tril(-1).any(2)
    return torch.where(inside & ~again, found, torch.full_like(found, -1))
