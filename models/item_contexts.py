"""A new item's vector moves with what its takers had taken: shrunk towards its text, less so with every event.

The context of an item is the mean vector of the items that it was counted with (`models.pair_counts`). A linear map,
fitted on known items that are treated as new, tells from a context how far the learnt out-vector lies from what the
text predicts; after n events `n / (n + PSEUDO_EVENTS)` of that is added. As with word vectors, an item is known by the
company it keeps. Everything follows from the pairs, so it is as deterministic, and stored nowhere else.

Letters: n items, D item-item dimensions, V dimensions of a context's vectors, M pairs kept per item, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.episodes import History, Interactions, earlier
from models.pair_counts import WINDOW, PairTable, Stakes, empty, learn

PSEUDO_EVENTS = 20.0
MOST_EVENTS = 10  # of an item that is treated as new
LEAST_ITEMS = 50  # with a context; fewer decide nothing
_RIDGE = 30.0
_BLOCK = 4096  # events counted at once


def contexts(others: Tensor, counts: Tensor, vectors: Tensor) -> Tensor:
    """Mean vector [R, V] of the items counted with each row; others [R, M] rows of vectors, -1 = none, counts [R, M].

    In double precision, so that a row does not depend on which others are computed beside it.
    """
    weights = torch.where(others >= 0, counts, 0.0).double()
    total = torch.einsum("rm,rmv->rv", weights, vectors[others.clamp(min=0)].double())
    return total / weights.sum(1, keepdim=True).clamp(min=1e-9)


def moves(found: Tensor, events: Tensor, context_map: Tensor) -> Tensor:
    """What contexts [R, V] after `events` [R] of each item add to out-vectors: [R, D], by a map [V + 1, D]."""
    trust = events.double() / (events.double() + PSEUDO_EVENTS)
    told: Tensor = torch.cat([found, found.new_ones(len(found), 1)], 1).double() @ context_map.double()
    return (trust[:, None] * told).float()


def fit_map(
    interactions: Interactions, stakes: Stakes, vectors: Tensor, missed: Tensor, *, num_pairs: int, seed: int
) -> Tensor:
    """Map [V + 1, D] from contexts over vectors [n, V] to what the text misses of out-vectors, `missed` [n, D].

    Half of the items at a time are treated as new: MOST_EVENTS of each are counted. Without rows ([0, D]) where items
    that the map was not fitted on come no nearer by it, by more than a standard error.
    """
    half = torch.rand(len(missed), generator=torch.Generator().manual_seed(seed)) < 0.5
    tables = [_counted(interactions, stakes, new, num_pairs) for new in (half, ~half)]
    picked = [torch.where(half[(...,) + (None,) * (one.dim() - 1)], one, other) for one, other in
              ((tables[0].others, tables[1].others), (tables[0].counts, tables[1].counts))]  # fmt: skip
    known = (picked[0] >= 0).any(1)
    if int(known[half].sum()) < LEAST_ITEMS or int(known[~half].sum()) < LEAST_ITEMS:
        return missed.new_zeros(0, missed.shape[1])
    found = contexts(picked[0], picked[1][..., 0], vectors).float()
    nearer = []
    for judges in (half & known, ~half & known):
        context_map = _solved(found[known & ~judges], missed[known & ~judges])
        events = torch.full((int(judges.sum()),), float(MOST_EVENTS))
        left = missed[judges] - moves(found[judges], events, context_map)
        nearer.append(missed[judges].square().sum(1) - left.square().sum(1))
    gain = torch.cat(nearer)
    if float(gain.mean()) <= float(gain.std()) / len(gain) ** 0.5:
        return missed.new_zeros(0, missed.shape[1])
    return _solved(found[known], missed[known])


def _counted(interactions: Interactions, stakes: Stakes, new: Tensor, num_pairs: int) -> PairTable:
    """Pairs of a window in which only the last MOST_EVENTS of each new item have happened."""
    by_item = History.of(interactions.items)
    kept = ~new[interactions.items] | (by_item.length - by_item.position <= MOST_EVENTS)
    events = interactions.select(kept)
    history, table = History.of(events.users), empty(interactions.num_items, num_pairs)
    for now in torch.split(torch.arange(len(events)), _BLOCK):
        learn(table, earlier(history, events.items, now, WINDOW), events.items[now], stakes)
    return table


def _solved(found: Tensor, missed: Tensor) -> Tensor:
    """Ridge on contexts [R, V] of unit spread, as a map [V + 1, D] of contexts as they are."""
    middle, spread = found.mean(0), found.std(0).mean().clamp(min=1e-9)
    inputs = torch.cat([(found - middle) / spread, found.new_ones(len(found), 1)], 1)
    normal = inputs.T @ inputs + _RIDGE * torch.eye(inputs.shape[1])
    solution: Tensor = torch.linalg.solve(normal, inputs.T @ missed)
    slope = solution[:-1] / spread
    return torch.cat([slope, (solution[-1] - middle @ slope)[None]])
