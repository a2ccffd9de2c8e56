"""What an inner loop adapts: a user's parameters, flat, that collapse to one vector over the inner factors.

An adapter says how many parameters a user has, what they collapse to, and how the slope of a loss by that vector
becomes a slope by the parameters. Items are scored by the vector alone (`factors @ vector`), so an inner loop touches
no item with the parameters themselves, and a served user costs one vector whatever the adapter was. A constant per
user would change neither a ranking nor a softmax, so no adapter has one.

Networks read a `context` [U, F]: the user's support set pooled in the space of the inner factors, of length 1.
Letters: U users, F inner factors, R rank, A parameters of a user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RANK = 4
CONTEXT_DECAY = 0.95  # of a support item's part in the context, per event of age


class Adapter(Protocol):
    """Shapes and collapse of one kind of adapter."""

    @property
    def size(self) -> int:
        """A."""

    @property
    def reads_context(self) -> bool:
        """False where the context makes no difference and need not be computed."""

    @property
    def head(self) -> Tensor:
        """[A] bool: parameters that the vector is linear in, given the others (what ANIL adapts)."""

    def initial(self, generator: torch.Generator) -> Tensor:
        """[A] parameters to begin meta-training with; they collapse to zero."""

    def collapse(self, parameters: Tensor, context: Tensor) -> Tensor:
        """[U, F] the served vector, from parameters [U, A] and context [U, F]."""

    def pull_back(self, parameters: Tensor, context: Tensor, slope: Tensor) -> Tensor:
        """[U, A] slope by the parameters of a loss whose slope by the collapsed vector is [U, F]."""


@dataclass(frozen=True)
class VectorAdapter:
    """The vector itself."""

    num_factors: int
    reads_context = False

    @property
    def size(self) -> int:
        """A = F."""
        return self.num_factors

    @property
    def head(self) -> Tensor:
        """Everything."""
        return torch.ones(self.size, dtype=torch.bool)

    def initial(self, generator: torch.Generator) -> Tensor:
        """Zeros."""
        del generator  # nothing is drawn
        return torch.zeros(self.size)

    def collapse(self, parameters: Tensor, context: Tensor) -> Tensor:
        """Return the parameters."""
        del context
        return parameters

    def pull_back(self, parameters: Tensor, context: Tensor, slope: Tensor) -> Tensor:
        """Return the slope."""
        del parameters, context
        return slope


@dataclass(frozen=True)
class LowRankAdapter:
    """A low-rank update of the map from context to vector, `vector = up (down context)` (LoRA, Hu 2021).

    Parameters: up [F, R], zero at first, then down [R, F].
    """

    num_factors: int
    rank: int = RANK
    reads_context = True

    @property
    def size(self) -> int:
        """A = 2 F R."""
        return 2 * self.num_factors * self.rank

    @property
    def head(self) -> Tensor:
        """The up half."""
        return torch.arange(self.size) < self.num_factors * self.rank

    def initial(self, generator: torch.Generator) -> Tensor:
        """Up zero; down random, so that a context of length 1 stays about as long."""
        half = self.num_factors * self.rank
        down = torch.randn(half, generator=generator) / self.rank**0.5
        return torch.cat([torch.zeros(half), down])

    def collapse(self, parameters: Tensor, context: Tensor) -> Tensor:
        """Two small products."""
        up, down = self._parts(parameters)
        return _times(up, _times(down, context))

    def pull_back(self, parameters: Tensor, context: Tensor, slope: Tensor) -> Tensor:
        """Slopes of both factors of the product."""
        up, down = self._parts(parameters)
        by_up = slope[:, :, None] * _times(down, context)[:, None]
        by_down = _times(up.transpose(1, 2), slope)[:, :, None] * context[:, None]
        return torch.cat([by_up.flatten(1), by_down.flatten(1)], 1)

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        up, down = parameters.chunk(2, 1)
        return up.view(-1, self.num_factors, self.rank), down.view(-1, self.rank, self.num_factors)


@dataclass(frozen=True)
class BottleneckAdapter:
    """A small network on the context, `vector = up tanh(down context + b) + c` (Houlsby 2019).

    Parameters: up [F, R] and c [F], zero at first, then down [R, F] and b [R].
    """

    num_factors: int
    rank: int = RANK
    reads_context = True

    @property
    def size(self) -> int:
        """A = 2 F R + F + R."""
        return 2 * self.num_factors * self.rank + self.num_factors + self.rank

    @property
    def head(self) -> Tensor:
        """Up and c."""
        return torch.arange(self.size) < self.num_factors * (self.rank + 1)

    def initial(self, generator: torch.Generator) -> Tensor:
        """Zeros, but for down."""
        before, after = torch.zeros(self.num_factors * (self.rank + 1)), torch.zeros(self.rank)
        down = torch.randn(self.num_factors * self.rank, generator=generator) / self.rank**0.5
        return torch.cat([before, down, after])

    def collapse(self, parameters: Tensor, context: Tensor) -> Tensor:
        """One layer down, one up."""
        up, constant, down, bias = self._parts(parameters)
        return _times(up, torch.tanh(_times(down, context) + bias)) + constant

    def pull_back(self, parameters: Tensor, context: Tensor, slope: Tensor) -> Tensor:
        """Back through both layers."""
        up, _, down, bias = self._parts(parameters)
        hidden = torch.tanh(_times(down, context) + bias)
        by_hidden = _times(up.transpose(1, 2), slope) * (1 - hidden.square())
        by_up, by_down = slope[:, :, None] * hidden[:, None], by_hidden[:, :, None] * context[:, None]
        return torch.cat([by_up.flatten(1), slope, by_down.flatten(1), by_hidden], 1)

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half = self.num_factors * self.rank
        up, constant, down, bias = torch.split(parameters, [half, self.num_factors, half, self.rank], 1)
        return (
            up.view(-1, self.num_factors, self.rank),
            constant,
            down.view(-1, self.rank, self.num_factors),
            bias,
        )


ADAPTERS = {"vector": VectorAdapter, "lora": LowRankAdapter, "bottleneck": BottleneckAdapter}


def adapter_named(name: str, num_factors: int) -> Adapter:
    """Make the adapter of that name. Raises ValueError for another name, and says which there are."""
    if name not in ADAPTERS:
        raise ValueError(f"there is no adapter {name!r}, only {', '.join(ADAPTERS)}")
    adapter: Adapter = ADAPTERS[name](num_factors)
    return adapter


def context_of(factors: Tensor, support: Tensor, weights: Tensor) -> Tensor:
    """Contexts [U, F]: support rows [U, S] (newest last, -1 = none) of factors [N, F], by weights [U, S] and age."""
    present = support >= 0
    ages = torch.arange(support.shape[1] - 1, -1, -1, device=support.device)
    gains = torch.where(present, weights, 0.0) * CONTEXT_DECAY**ages
    pooled = torch.nn.functional.embedding_bag(support.clamp(min=0), factors, per_sample_weights=gains, mode="sum")
    return torch.nn.functional.normalize(pooled, dim=1)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[U, M] from matrices [U, M, K] and vectors [U, K]."""
    return (matrices @ vectors[:, :, None])[:, :, 0]
