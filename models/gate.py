"""Knowing when not to adapt: a user's adapter is served as long as it does not lose to its start.

What an adapter has earned is a discounted sum of the start's loss minus its own, over the user's recent predictions:

    track_t = discount * track_{t-1} + loss_start_t - loss_adapted_t

The gate is open while that is not below minus `credit` nats. A closed gate serves the start; the adapter is still
predicted with and still learns, so that it is served again once it has won. Letters: U users.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What a user's list was made with. A diverged adapter was thrown away and begins anew behind a closed gate.
UNUSED, SERVED, GATED, DIVERGED = range(4)


@dataclass(frozen=True)
class Gate:
    """The learnt constants: `discount` per event in [0, 1], `credit` in nats, above 0."""

    discount: float
    credit: float

    @property
    def shut(self) -> float:
        """The track of an adapter that diverged: closed for the next few events, even if they all go well."""
        return -2.0 * self.credit

    def follow(self, track: Tensor, gain: Tensor) -> Tensor:
        """Track [U] after one more prediction that gained [U] nats."""
        return self.discount * track + gain

    def is_open(self, track: Tensor) -> Tensor:
        """Whether the adapter may be served [U]."""
        return track >= -self.credit

    def use(self, track: Tensor, *, sound: Tensor, moves: Tensor) -> Tensor:
        """UNUSED … DIVERGED [U] int64. sound: the inner state can be served; moves: it is one that changes scores."""
        usable, is_open = sound & moves, self.is_open(track)
        judged = torch.where(is_open, SERVED, GATED)
        # an empty state behind a closed gate can only come from one that was thrown away
        return torch.where(usable, judged, torch.where(sound & is_open, UNUSED, DIVERGED))
