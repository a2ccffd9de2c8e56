"""Memories of several lengths, mixed for every user by what each has lately lost on her events.

A memory is a set of decays of the start's parts. A long one is right about steady tastes, a short one about those that
have just changed, and nobody says which are which: so all of them predict each event, and count by their discounted
losses, as an adapter does against its start (`models.gate`):

    track_m = discount * track_m + loss_0 - loss_m,   weight = softmax(rate * (track - caution)),   both 0 for memory 0

These are exponential weights (Vovk 1990) that forget (Herbster and Warmuth 1998, tracking the best expert). Memory 0,
which is best alone, is in charge until another has earned `caution` nats: most users never change. The mean of
the memories' starts is a start again, one vector and one list, so that serving costs the same.
Letters: U users, M memories, P parts, S support slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.meta_parameters import MetaParameters

# Of the predictions that memories are judged by: the same when they are chosen and served, whatever the inner step's.
TAU = 1.5


@dataclass(frozen=True)
class Memories:
    """The learnt constants: `decays` [M, P] per event of age, `discount` per event, `rate` per nat, `caution` nats."""

    decays: Tensor
    discount: float
    rate: float
    caution: float

    @classmethod
    def of(cls, parameters: MetaParameters) -> Memories:
        """Those of a version."""
        decays = torch.cat([parameters.part_decays[None], parameters.memory_decays])
        return cls(decays, parameters.memory_discount, parameters.memory_rate, parameters.memory_caution)

    @classmethod
    def single(cls, decays: Tensor) -> Memories:
        """One memory: decays [P]."""
        return cls(decays[None], discount=0.0, rate=0.0, caution=0.0)

    def fields(self) -> dict[str, Any]:
        """Give the fields of meta-parameters that say so."""
        return {
            "part_decays": self.decays[0],
            "memory_decays": self.decays[1:],
            "memory_discount": self.discount,
            "memory_rate": self.rate,
            "memory_caution": self.caution,
        }

    def __len__(self) -> int:
        """M."""
        return len(self.decays)

    def weights(self, track: Tensor) -> Tensor:
        """How much each memory counts [U, M], from tracks [U, M - 1] of all but the first."""
        return torch.softmax(functional.pad(self.rate * (track - self.caution), (1, 0)), 1)

    def gains(self, support_size: int) -> Tensor:
        """Share of its weight that a positive keeps in every slot, newest last: [M, P, S]."""
        ages = torch.arange(support_size - 1, -1, -1, dtype=torch.float32, device=self.decays.device)
        return self.decays[..., None] ** ages
