"""Item-item parts and item factors from interactions: the slow, exact matrices that the served tables stand for.

Letters: E events, U users, N items, T text dimensions, F factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.episodes import History, Interactions
from models.recipe import DEFAULT, Recipe

PARTS = ("cosine", "next20", "next8", "ease")
# Counts are divided by an asymmetric cosine's denominator (Aiolli 2013): a little less is given to popular items.
COUNTED = 3  # the first parts are counts over `similarity_scale`
HORIZONS = (20, 20, 8)  # events between the two items of a counted pair; the cosine's holds online only
ASYMMETRY = 0.55


@dataclass(frozen=True)
class Matrix:
    """Users' distinct items as two sorted index lists (user number, item)."""

    users: Tensor
    items: Tensor
    num_users: int
    num_items: int

    @classmethod
    def of(cls, interactions: Interactions) -> Matrix:
        """Number the users 0..U-1 and drop repeats."""
        _, users = torch.unique(interactions.users, return_inverse=True)
        num_users = int(users.max()) + 1 if len(users) else 0
        cells = torch.unique(users * interactions.num_items + interactions.items)
        return cls(cells // interactions.num_items, cells % interactions.num_items, num_users, interactions.num_items)

    def gram(self) -> Tensor:
        """How many users had both: [N, N] float32, the sum of what an item's takers had."""
        had = torch.zeros(self.num_users, self.num_items)
        had[self.users, self.items] = 1.0
        items, order = torch.sort(self.items)
        first = torch.searchsorted(items, torch.arange(self.num_items))
        return functional.embedding_bag(self.users[order], had, first, mode="sum")


def directed(interactions: Interactions, history: History, horizon: int) -> Tensor:
    """How often column came within `horizon` events after row: [N, N] float32."""
    num = interactions.num_items
    items, position = interactions.items[history.order], history.position[history.order]
    counts = torch.zeros(num * num)
    for lag in range(1, min(horizon, len(items) - 1) + 1):
        later = position[lag:] >= lag
        cell = items[:-lag][later] * num + items[lag:][later]
        counts.index_add_(0, cell, torch.ones(len(cell)))
    return counts.view(num, num)


def ease(gram: Tensor, ridge: float = 1000.0) -> Tensor:
    """EASE item-item weights [N, N], row = item had, column = item scored (Steck 2019)."""
    inverse: Tensor = torch.linalg.inv(gram + ridge * torch.eye(len(gram)))
    weights = -inverse / inverse.diagonal()[None]
    return weights.fill_diagonal_(0.0)


def part_matrices(interactions: Interactions, recipe: Recipe = DEFAULT) -> list[Tensor]:
    """The parts in the order of PARTS, each [N, N]: row = item had, column = item scored."""
    history = History.of(interactions.users)
    gram = Matrix.of(interactions).gram()
    users = gram.diagonal().clone()
    both = similarity_scale(users[:, None], users[None])
    weights = ease(gram, recipe.ease_ridge)
    counted = [gram, *(directed(interactions, history, horizon) for horizon in HORIZONS[1:])]
    for counts, pseudo in zip(counted, recipe.pseudo_events.tolist(), strict=True):
        counts.fill_diagonal_(0.0).div_(both + pseudo)
    return [*counted, weights]


def similarity_factors(users: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of `similarity_scale`, of items as the one had and as the one scored."""
    return torch.pow(users, ASYMMETRY), torch.pow(users, 1 - ASYMMETRY)


def similarity_scale(had: Tensor, scored: Tensor) -> Tensor:
    """What co-occurrence is expected to grow with, from the users of the item had and of the item scored."""
    return similarity_factors(had)[0] * similarity_factors(scored)[1]


def als_factors(
    matrix: Matrix, *, num_factors: int, ridge: float = 20.0, alpha: float = 3.0, rounds: int = 8, seed: int = 0
) -> Tensor:
    """Item factors [N, F] of implicit ALS (Hu 2008): lengths evened out, centred, mean squared length 1."""
    generator = torch.Generator().manual_seed(seed)
    items = 0.1 * torch.randn(matrix.num_items, num_factors, generator=generator)
    by_item = torch.argsort(matrix.items, stable=True)
    for _ in range(rounds):
        users = _half(matrix.users, matrix.items, items, matrix.num_users, ridge=ridge, alpha=alpha)
        items = _half(matrix.items[by_item], matrix.users[by_item], users, matrix.num_items, ridge=ridge, alpha=alpha)
    squared = items.square().sum(1, keepdim=True)
    return _centred(items / torch.sqrt(squared + 0.05 * squared.median() + 1e-12))


def text_factors(embeddings: Tensor, num_factors: int) -> Tensor:
    """Principal components [N, F] of texts [N, T]: centred, mean squared length 1; zeros where texts do not differ."""
    centred = embeddings - embeddings.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -num_factors:]
    return _centred(functional.pad(centred @ axes, (num_factors - axes.shape[1], 0)))


def _centred(factors: Tensor) -> Tensor:
    factors = factors - factors.mean(0)
    return factors / factors.square().sum(1).mean().sqrt().clamp(min=1e-6)


def _half(rows: Tensor, columns: Tensor, fixed: Tensor, num_rows: int, *, ridge: float, alpha: float) -> Tensor:
    """Solve for every row's factors given the columns' factors; `rows` is sorted."""
    num_factors = fixed.shape[1]
    shared = fixed.T @ fixed + ridge * torch.eye(num_factors)
    counts = torch.bincount(rows, minlength=num_rows)
    first = torch.cumsum(counts, 0) - counts
    solved = torch.zeros(num_rows, num_factors)
    by_length = torch.argsort(counts, descending=True, stable=True)
    for chunk in torch.split(by_length, 64):
        longest = int(counts[chunk[0]])
        if longest == 0:
            break
        slot = torch.arange(longest)
        present = slot < counts[chunk][:, None]
        place = (first[chunk][:, None] + slot).clamp(max=len(columns) - 1)
        had = fixed[columns[place]] * present[..., None]
        normal = shared + alpha * had.transpose(1, 2) @ had
        factor = torch.linalg.cholesky(normal)
        solved[chunk] = torch.cholesky_solve((1 + alpha) * had.sum(1)[..., None], factor)[..., 0]
    return solved
