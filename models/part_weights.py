"""Part weights by bucket of K, by set nDCG on validation users: cross-entropy chooses worse ones.

Letters: E events, P item-item parts, B buckets, C candidates, Q query slots, S support slots, N items.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models import popularity
from models.factoring import standardise, user_scores
from models.figures import query_ranks, set_ndcg, user_means

# Chosen on MovieLens-100K's `tune` phase; rows: buckets of K; columns: popularity, cosine, next 20, next 5, EASE.
INITIAL_WEIGHTS = (
    (0.354, 0.165, 0.15, 0.165, 0.165),
    (0.458, 0.313, 0.05, 0.098, 0.081),
    (0.204, 0.68, 0.005, 0.08, 0.03),
    (0.0, 0.748, 0.039, 0.154, 0.059),
    (0.019, 0.431, 0.063, 0.299, 0.188),
    (0.038, 0.178, 0.091, 0.37, 0.322),
    (0.019, 0.152, 0.235, 0.243, 0.35),
    (0.0, 0.145, 0.392, 0.071, 0.392),
)
_CANDIDATES = 200
_SAMPLE = 400
_MOVES = ((0.6, 0.0), (1.5, 0.0), (1.0, 0.06))  # (factor, addend), tried on every weight in turn
_ROUNDS = 3
_LEAST_GAIN = 3e-4
_LEAST_EVENTS = 100


def scored_candidates(
    matrices: list[Tensor], priors: Tensor, support: Tensor, gains: Tensor, query: Tensor, weights: Tensor
) -> Tensor:
    """Standardised parts of candidates and of query items: [E, 1 + P, C + Q].

    priors [E, N], support [E, S], gains [E, S, P], query [E, Q] (-1 = none), weights [E, 1 + P] that choose the
    candidates. What the user had is no candidate.
    """
    parts = [standardise(user_scores(matrix, support, gains[..., p])) for p, matrix in enumerate(matrices)]
    scores = torch.stack([priors, *parts], 1)
    mixed = torch.einsum("ep,epn->en", weights, scores)
    had = torch.zeros_like(mixed).scatter_add_(1, support.clamp(min=0), (support >= 0).float()) > 0
    best = mixed.masked_fill(had, -torch.inf).topk(min(_CANDIDATES, mixed.shape[1]), 1).indices
    columns = torch.cat([best, query.clamp(min=0)], 1)
    chosen = scores.gather(2, columns[:, None].expand(-1, scores.shape[1], -1))
    # a query item that is a candidate as well would tie with itself
    twice = (best[:, :, None] == query[:, None]).any(2)
    chosen[:, :, : best.shape[1]].masked_fill_(twice[:, None], 0.0)
    return torch.cat([chosen, torch.cat([twice, torch.zeros_like(query, dtype=torch.bool)], 1)[:, None].float()], 1)


def objective(scored: Tensor, query: Tensor, users: Tensor, weights: Tensor) -> float:
    """Mean over users of set nDCG@10 under weights [1 + P]; `scored` from `scored_candidates`."""
    mixed = torch.einsum("p,epc->ec", weights, scored[:, :-1]).masked_fill(scored[:, -1] > 0, -torch.inf)
    num_query = query.shape[1]
    column = torch.arange(mixed.shape[1] - num_query, mixed.shape[1]).expand_as(query)
    # absent query slots must not outrank anything
    mixed[:, -num_query:] = mixed[:, -num_query:].masked_fill(query < 0, -torch.inf)
    ranks = query_ranks(mixed, torch.where(query >= 0, column, -1))
    return float(user_means(set_ndcg(ranks), users).mean())


def search(scored: Tensor, query: Tensor, users: Tensor, initial: Tensor) -> Tensor:
    """Better weights [1 + P] by coordinate moves, then half-way back to the initial ones (few users decide)."""
    weights = initial / initial.sum()
    best = objective(scored, query, users, weights)
    for _ in range(_ROUNDS):
        before = best
        for part in range(len(weights)):
            for factor, addend in _MOVES:
                tried = weights.clone()
                tried[part] = tried[part] * factor + addend
                tried = tried / tried.sum()
                value = objective(scored, query, users, tried)
                if value > best + _LEAST_GAIN:
                    weights, best = tried, value
        if best == before:
            break
    return 0.5 * (weights + initial / initial.sum())


def sample_of_bucket(num_events: Tensor, bucket: int, seed: int) -> Tensor:
    """At most 400 event numbers, ascending, whose K lies in a bucket; none where there are too few to decide."""
    candidates = (popularity.bucket_of(num_events) == bucket).nonzero()[:, 0]
    if len(candidates) < _LEAST_EVENTS:
        return candidates[:0]
    generator = torch.Generator().manual_seed(seed)
    return candidates[torch.randperm(len(candidates), generator=generator)[:_SAMPLE]].sort().values
