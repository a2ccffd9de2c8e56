"""Popularity: counted once, counted on, or counted by position (what users take as their K-th item).

Letters: U users, N items, B buckets of K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models import popularity
from models.episodes import History, Interactions
from models.peers.peer import Known


class Popular:
    """The items that most events have, by counts at the end of the fit or counted on."""

    def __init__(self, fitted: Interactions, *, online: bool) -> None:
        self._counts = torch.bincount(fitted.items, minlength=fitted.num_items).float()
        self._online = online

    def scores(self, known: Known) -> Tensor:
        """The counts, the same for everybody."""
        return self._counts.expand(len(known.num_events), -1)

    def learn(self, known: Known, items: Tensor) -> None:
        """Count on."""
        if self._online:
            self._counts = self._counts + torch.bincount(items, minlength=len(self._counts))


class PositionPopular:
    """What people take first, second, …: decayed counts by bucket of K, as the ranker's own prior."""

    def __init__(self, fitted: Interactions, *, online: bool, half_life: float, least_events: int = 0) -> None:
        """Half-life in events; `least_events`: what is asked for comes at this position of a user or later."""
        nothing = torch.zeros(popularity.NUM_BUCKETS, fitted.num_items)
        buckets = popularity.bucket_of(History.of(fitted.users).position)
        self._counts = popularity.advance(nothing, buckets, fitted.items, half_life=half_life)
        self._online, self._half_life, self._least_events = online, half_life, least_events

    def scores(self, known: Known) -> Tensor:
        """Standardised log popularity at the user's position."""
        buckets = popularity.bucket_of(known.num_events.clamp(min=self._least_events))
        return popularity.priors(self._counts)[buckets]

    def learn(self, known: Known, items: Tensor) -> None:
        """Count on."""
        if self._online:
            buckets = popularity.bucket_of(known.num_events)
            self._counts = popularity.advance(self._counts, buckets, items, half_life=self._half_life)


class Repeats:
    """What the user has had before, newest and most often first: hard to beat where people buy again."""

    def __init__(self, fitted: Interactions, *, decay: float) -> None:
        self._num_items, self._decay = fitted.num_items, decay

    def scores(self, known: Known) -> Tensor:
        """Decayed counts of the user's own items."""
        return known.weighted(self._num_items, self._decay)

    def learn(self, known: Known, items: Tensor) -> None:
        """Nothing is shared between users."""
