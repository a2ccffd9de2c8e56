"""What an inner loop descends: losses of many users at once, with their slopes written by hand.

With the slope an ordinary expression, a meta-gradient of second order is an ordinary backward pass, needs no nested
autograd, and works under `no_grad` where only the inner loop runs. Padding is finite everywhere: `0 * nan` is nan.
Letters: U users, C candidates, G predictions, F inner factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ABSENT = -1e4  # logit of a candidate that does not compete: finite, and its exponential is zero in float32 and 64


class InnerLoss(Protocol):
    """A loss per user as a function of the user's vector [U, F]; a sum over events, not a mean."""

    @property
    def mass(self) -> Tensor:
        """[U] weight of the events that the loss sums over."""

    def value(self, vector: Tensor) -> Tensor:
        """[U], at vector [U, F]."""

    def slope(self, vector: Tensor) -> Tensor:
        """[U, F] gradient of `value`, at vector [U, F]."""

    def solve(self, precision: Tensor) -> Tensor:
        """[U, F] minimum of the loss's least-squares form at zero plus `precision` [F] times the squared vector / 2."""


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy of G predictions over C candidates, each offset by logits that are not adapted.

    With G = 1 all targets share one offset: the present start, or zeros for a constant one. With one prediction per
    event its offset is what the start gave *before* that event, which makes the residuals honest.

    Attributes:
        vectors: [U, C, F] candidates' vectors, times the inverse temperature; zeros where absent.
        offset: [U, G, C] logits besides `vectors @ vector`, ABSENT where a candidate does not compete.
        target: [U, G, C] weight of each candidate as the truth; zero where absent.

    """

    vectors: Tensor
    offset: Tensor
    target: Tensor

    @property
    def mass(self) -> Tensor:
        """[U] sum of the targets."""
        return self.target.sum((1, 2))

    def value(self, vector: Tensor) -> Tensor:
        """Sum of -target * log softmax."""
        logits = self.offset + _logits(self.vectors, vector)[:, None]
        return -(self.target * torch.log_softmax(logits, 2)).sum((1, 2))

    def slope(self, vector: Tensor) -> Tensor:
        """What was predicted less what was true, in the space of the vectors."""
        logits = self.offset + _logits(self.vectors, vector)[:, None]
        residual = (self.target.sum(2, keepdim=True) * torch.softmax(logits, 2) - self.target).sum(1)
        return (residual[:, :, None] * self.vectors).sum(1)

    def solve(self, precision: Tensor) -> Tensor:
        """Ridge regression of the residuals at zero on the candidates' vectors (normal equations, Cholesky)."""
        normal = self.vectors.transpose(1, 2) @ self.vectors + torch.diag(precision)
        right = -self.slope(self.vectors.new_zeros(len(self.vectors), self.vectors.shape[2]))
        solved: Tensor = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(normal))[:, :, 0]
        return solved


@dataclass(frozen=True)
class HonestQuadratic:
    """The honest cross-entropy over the whole catalogue, to second order around no deviation.

    Its slope at zero is exact: `state`, the discounted sum of honest residuals that a worker keeps (inner_loop.py); its
    curvature is the shared metric. So any learner runs on one vector and one count per user.

    Attributes:
        state: [U, F] discounted sum of honest residuals.
        weight: [U] discounted number of them.
        metric: [F] variance of each factor under the start's prediction.
        tau: inverse temperature of the prediction.

    """

    state: Tensor
    weight: Tensor
    metric: Tensor
    tau: float

    @property
    def mass(self) -> Tensor:
        """[U] the weight."""
        return self.weight

    def value(self, vector: Tensor) -> Tensor:
        """Up to a constant, and divided by tau."""
        return (0.5 * vector * self._curvature() * vector - self.state * vector).sum(1)

    def slope(self, vector: Tensor) -> Tensor:
        """Linear in the vector."""
        return self._curvature() * vector - self.state

    def solve(self, precision: Tensor) -> Tensor:
        """One MAP step: the metric is diagonal, so the solve is a division."""
        return self.state / (self._curvature() + self.tau * precision)

    def _curvature(self) -> Tensor:
        return self.tau * self.weight[:, None] * self.metric


def _logits(vectors: Tensor, vector: Tensor) -> Tensor:
    """[U, C]. A product and a sum, because a compiler fuses them with what follows; a batched matmul it does not."""
    return (vectors * vector[:, None]).sum(2)
