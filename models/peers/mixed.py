"""A peer with a popularity prior beside it, and the choice of its settings on validation users.

Letters: U users, N items, B buckets of K, Q query slots, G grid of prior weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from models import popularity
from models.episodes import Interactions
from models.factoring import standardise
from models.figures import query_ranks, set_ndcg
from models.peers.peer import Known, Peer

PRIOR_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_LEAST_EVENTS = 30
_BLOCK = 256

Setting = TypeVar("Setting")


class Mixed:
    """(1 - w) times the standardised peer plus w times the standardised prior, w by bucket of K [B]."""

    def __init__(self, peer: Peer, prior: Peer, weights: Tensor) -> None:
        self._peer, self._prior, self._weights = peer, prior, weights

    def scores(self, known: Known) -> Tensor:
        """Weighted sum of both."""
        weight = self._weights[popularity.bucket_of(known.num_events)][:, None]
        peer, prior = standardise(self._peer.scores(known)), standardise(self._prior.scores(known))
        return (1 - weight) * peer + weight * prior

    def learn(self, known: Known, items: Tensor) -> None:
        """Let both learn."""
        self._peer.learn(known, items)
        self._prior.learn(known, items)


@dataclass(frozen=True)
class Examples:
    """Validation users before an event, the items to be found [U, Q] (-1 = none), and what is not ranked [U, N]."""

    known: Known
    query: Tensor
    masked: Tensor


@dataclass(frozen=True)
class Choice(Generic[Setting]):
    """The setting that did best on validation users, with the prior's weights [B] and its set nDCG@10 there."""

    setting: Setting
    weights: Tensor
    figure: float


def choose(
    make: Callable[[Setting], Peer], settings: Sequence[Setting], prior: Peer, examples: Examples
) -> Choice[Setting]:
    """Try every setting with every prior weight; buckets with few examples share one weight."""
    standing = standardise(prior.scores(examples.known))
    choices = [_weighed(make(setting), setting, standing, examples) for setting in settings]
    return max(choices, key=lambda choice: choice.figure)


def _weighed(peer: Peer, setting: Setting, prior: Tensor, examples: Examples) -> Choice[Setting]:
    own = standardise(scores_in_blocks(peer, examples.known))
    figures = torch.stack([_figures(own, prior, weight, examples) for weight in PRIOR_WEIGHTS])
    buckets = popularity.bucket_of(examples.known.num_events)
    overall, rows = int(figures.mean(1).argmax()), []
    for bucket in range(popularity.NUM_BUCKETS):
        mine = buckets == bucket
        rows.append(int(figures[:, mine].mean(1).argmax()) if int(mine.sum()) >= _LEAST_EVENTS else overall)
    chosen = figures[torch.tensor(rows)[buckets], torch.arange(len(buckets))]
    return Choice(setting, torch.tensor(PRIOR_WEIGHTS)[rows], float(chosen.mean()))


def _figures(own: Tensor, prior: Tensor, weight: float, examples: Examples) -> Tensor:
    """Set nDCG@10 [U] under one prior weight."""
    mixed = ((1 - weight) * own + weight * prior).masked_fill(examples.masked, -torch.inf)
    return set_ndcg(query_ranks(mixed, examples.query))


def scores_in_blocks(peer: Peer, known: Known) -> Tensor:
    """Scores [U, N], computed some users at a time."""
    rows = torch.arange(len(known.num_events))
    return torch.cat([peer.scores(known.select(block)) for block in torch.split(rows, _BLOCK)])


def fit_mixed(
    make: Callable[[Interactions, Setting], Peer],
    make_prior: Callable[[Interactions], Peer],
    windows: tuple[Interactions, Interactions],
    settings: Sequence[Setting],
    examples: Examples,
) -> tuple[Mixed, Choice[Setting]]:
    """Choose on the earlier window's validation users, then fit on the whole. windows: (earlier part, whole)."""
    early, whole = windows
    choice = choose(lambda setting: make(early, setting), settings, make_prior(early), examples)
    return Mixed(make(whole, choice.setting), make_prior(whole), choice.weights), choice
