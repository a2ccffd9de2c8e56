"""From exact item-item matrices to served tables: few dimensions, and a sparse rest.

Letters: E sampled tasks, S support slots, N items, P parts, D dimensions, M neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.item_fitting import COUNTED


class ServedParts(NamedTuple):
    """See `MetaParameters` for the fields of the same names."""

    item_out: Tensor
    item_in: Tensor
    item_spread: Tensor
    neighbour_items: Tensor
    neighbour_values: Tensor
    pair_means: Tensor
    pair_worth: Tensor


def user_scores(matrix: Tensor, support: Tensor, gains: Tensor) -> Tensor:
    """What one part gives to all items: [E, N] from matrix [N, N], support [E, S] (-1 = none), gains [E, S]."""
    had = matrix.new_zeros(len(support), len(matrix))
    had.scatter_add_(1, support.clamp(min=0), torch.where(support >= 0, gains, 0.0))
    return had @ matrix


def standardise(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the catalogue; zeros stay zeros."""
    centred = scores - scores.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


class Centred(NamedTuple):
    """Matrices P x [N, N] less their rows' means [N, P] (a constant per user changes no ranking)."""

    matrices: list[Tensor]
    means: Tensor


def centred(matrices: list[Tensor]) -> Centred:
    """Take off every row's mean."""
    means = torch.stack([matrix.mean(1) for matrix in matrices], 1)
    return Centred([matrix - means[:, p, None] for p, matrix in enumerate(matrices)], means)


def factor(
    parts: Centred, support: Tensor, gains: Tensor, shares: Tensor, *, num_dims: int, num_neighbours: int
) -> ServedParts:
    """Factor centred matrices P x [N, N] along the directions in which sampled users' scores vary.

    `support` [E, S] and `gains` [E, S, P] are sampled tasks, `shares` [E, P] their part weights: the directions are
    the principal ones of the weighted, standardised scores, since those are what the served form has to reproduce.
    The out-vectors have unit covariance over the catalogue, so a part's variance is its in-vector's squared length.
    """
    matrices, means = parts
    num_items = len(matrices[0])
    second = torch.zeros(num_items, num_items)
    scales = []
    for p, matrix in enumerate(matrices):
        scores = user_scores(matrix, support, gains[..., p])
        scales.append(scores.square().mean(1).sqrt().mean().clamp(min=1e-9))
        weighted = standardise(scores) * shares[:, p : p + 1]
        second += weighted.T @ weighted
    out = _principal(second, min(num_dims, num_items)) * num_items**0.5
    # a small catalogue's missing dimensions are zeros: kernels stay on whole cache lines, and rows bit-equal
    out = torch.nn.functional.pad(out, (0, num_dims - out.shape[1]))
    inside = [matrix @ out / num_items for matrix in matrices]
    left_out = [matrix - vectors @ out.T for matrix, vectors in zip(matrices, inside, strict=True)]
    worth = shares.mean(0) / torch.stack(scales)
    return ServedParts(
        out.contiguous(),
        torch.stack(inside, 1),
        torch.stack([rest.square().mean(1) for rest in left_out], 1),
        *_neighbours(parts, left_out, worth, num_neighbours),
        means[:, :COUNTED].contiguous(),
        worth[:COUNTED].contiguous(),
    )


def _principal(second: Tensor, num_dims: int) -> Tensor:
    """Leading eigenvectors [N, D] of a second-moment matrix [N, N], by subspace iteration when it is large."""
    if len(second) <= 2000:
        exact: Tensor = torch.linalg.eigh(second).eigenvectors
        return exact[:, -num_dims:].flip(1)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(second), num_dims + 16, generator=generator)
    for _ in range(8):
        basis = torch.linalg.qr(second @ basis).Q
    rotation: Tensor = torch.linalg.eigh(basis.T @ second @ basis).eigenvectors
    return (basis @ rotation)[:, -num_dims:].flip(1)


def _neighbours(parts: Centred, left_out: list[Tensor], worth: Tensor, num_neighbours: int) -> tuple[Tensor, Tensor]:
    """Every item's pairs whose exact value is worth most, as online counts would choose them, and what is left out."""
    whole = torch.zeros_like(left_out[0])
    for p, matrix in enumerate(parts.matrices):
        whole += worth[p] * (matrix + parts.means[:, p, None])
    best = whole.topk(min(num_neighbours, len(whole)), 1)
    values = torch.stack([rest.gather(1, best.indices) for rest in left_out], 2)
    useful = best.values > 0
    return torch.where(useful, best.indices, -1), torch.where(useful[..., None], values, 0.0)
