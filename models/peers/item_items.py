"""Item-item peers: cosine neighbours counted online, and EASE, refitted as events come.

Letters: U users, N items.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from models.episodes import Interactions
from models.item_fitting import Matrix, ease
from models.peers.peer import Known

REFIT_EVENTS = 2000
MOST_ITEMS_TO_REFIT = 3000  # inverting takes N^3: 0.3 s at 2,000 items, 40 s at 10,000


class _Pairs:
    """How many users had both items: [N, N], counted on."""

    def __init__(self, fitted: Interactions) -> None:
        self.gram = Matrix.of(fitted).gram()

    def learn(self, known: Known, items: Tensor) -> None:
        """Pair each new item with all that the user had; a repeat counts nothing."""
        had = known.had(len(self.gram))
        new = had.gather(1, items[:, None])[:, 0] == 0
        had, items = had[new], items[new]
        self.gram.index_add_(0, items, had)
        self.gram.index_add_(1, items, had.T)
        self.gram.diagonal().index_add_(0, items, torch.ones(len(items)))


class ItemKNN:
    """Shrunk cosine (Sarwar 2001): co(i, j) / (sqrt(n_i n_j) + shrink), summed over the user's events with decay."""

    def __init__(self, fitted: Interactions, *, shrink: float, decay: float) -> None:
        self._pairs = _Pairs(fitted)
        self._shrink, self._decay = shrink, decay

    def scores(self, known: Known) -> Tensor:
        """Similarity to what the user had."""
        return known.summed(self._similar, self._decay)

    def learn(self, known: Known, items: Tensor) -> None:
        """Count on."""
        self._pairs.learn(known, items)

    def _similar(self, had: Tensor) -> Tensor:
        """Similarities of items [R] to all: [R, N]."""
        gram = self._pairs.gram
        events = gram.diagonal()
        similar = gram[had] / (torch.sqrt(events[had][:, None] * events) + self._shrink)
        similar[torch.arange(len(had)), had] = 0.0
        return similar


@lru_cache(maxsize=1)
def _regression(fitted: Interactions, ridge: float) -> Tensor:
    """EASE's weights [N, N], kept for the next setting that is tried: it differs by decay alone."""
    return ease(Matrix.of(fitted).gram(), ridge)


class Ease:
    """EASE (Steck 2019): the closed-form item-item regression with a zero diagonal."""

    def __init__(self, fitted: Interactions, *, ridge: float, decay: float) -> None:
        self._pairs = _Pairs(fitted)
        self._ridge, self._decay, self._since = ridge, decay, 0
        self._weights = _regression(fitted, ridge)

    def scores(self, known: Known) -> Tensor:
        """Regression of every item on what the user had."""
        return known.summed(self._weights.__getitem__, self._decay)

    def learn(self, known: Known, items: Tensor) -> None:
        """Count on, and fit again every REFIT_EVENTS events where the catalogue is small enough."""
        if len(self._weights) > MOST_ITEMS_TO_REFIT:
            return
        self._pairs.learn(known, items)
        self._since += len(items)
        if self._since >= REFIT_EVENTS:
            self._weights, self._since = ease(self._pairs.gram, self._ridge), 0
