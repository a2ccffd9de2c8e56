"""Part weights by bucket of K, by nDCG on validation users: cross-entropy chooses worse ones.

Letters: E events, P item-item parts, B buckets, C candidates, Q query slots, S support slots, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models import popularity
from models.episodes import History, Interactions, earlier, following
from models.figures import half_of_users, query_ranks, set_ndcg, stream_ndcg, surely_gain, user_means
from models.ranker import Ranker
from models.replay import QUERY, epochs

# Chosen on MovieLens-100K's `tune` phase; rows: buckets of K; columns: popularity, cosine, next 20, next 8, EASE.
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
_ERRORS_OF_BUCKET = 3.0
_CHUNK = 64


Figures = Callable[[Tensor, Tensor, Tensor], Tensor]  # of scored, query and weights; [E]
Progress = Callable[[int, int], None]


class Sample(NamedTuple):
    """Sampled events: `scored` from `scored_candidates`, query [E, Q], users [E], bucket of K [E]."""

    scored: Tensor
    query: Tensor
    users: Tensor
    buckets: Tensor

    def select(self, mask: Tensor) -> Sample:
        """Keep the events of a mask [E]."""
        return Sample(*(column[mask] for column in self))

    def beside(self, other: Sample) -> Sample:
        """Both, of different users."""
        return Sample(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    def figures(self, weights: Tensor) -> Tensor:
        """`stream_figures` [E] under weights [B, 1 + P]."""
        return stream_figures(self.scored, self.query, weights[self.buckets])


class Weighed(NamedTuple):
    """Part weights [B, 1 + P], and names of the item-item parts that are off: zero in every bucket."""

    weights: Tensor
    parts_off: tuple[str, ...]


def weigh(
    initial: Tensor, parts: Sequence[str], later: Sample, earlier: Sample, progress: Progress, *, seed: int
) -> Weighed:
    """Choose weights [B, 1 + P], beginning at the initial ones, by the later sample; those where it is empty.

    A part is off unless users gain by it, of the later sample and of the earlier one together: one season, in which
    everybody took the same few things, must not decide for all to come that nothing else counts.
    """
    if not len(later.users):
        return Weighed(initial, ())
    progress(0, len(initial))
    searched, both = _searched(later, initial, progress), later.beside(earlier)
    gains = gains_of_parts(both, initial, seed=seed)
    kept, off = without_idle_parts(both, where_parts_pay(both, searched, gains))
    return Weighed(kept, tuple(parts[part - 1] for part in off))


def without_idle_parts(sample: Sample, weights: Tensor) -> tuple[Tensor, list[int]]:
    """Weights [B, 1 + P] without the item-item parts that users do not gain from, and the columns that are zero now."""
    off = []
    for part in range(1, weights.shape[1]):
        without = weights.clone()
        without[:, part] = 0.0
        without[:, 0] += without.sum(1) == 0  # something has to rank
        without = without / without.sum(1, keepdim=True)
        if user_means(sample.figures(weights) - sample.figures(without), sample.users).mean() <= 0:
            weights = without
            off.append(part)
    return weights, off


def where_parts_pay(sample: Sample, weights: Tensor, gains: Tensor) -> Tensor:
    """Weights [B, 1 + P], popularity alone in buckets whose users do not gain by the item-item parts together.

    The search begins at what was best elsewhere and ends no more than half-way from there. Where items say nothing of
    one another that would leave half of what they say elsewhere. gains [E]: what users gained over popularity under
    weights that they did not choose. All users together decide, and of a bucket its own where they differ by more than
    three standard errors: there are seven of them, and users of one season err together.
    """
    supported = sample.buckets > 0
    common = surely_gain(user_means(gains[supported], sample.users[supported]))
    pay = torch.full((len(weights),), common)
    for bucket in torch.unique(sample.buckets).tolist():
        mine = sample.buckets == bucket
        opposed = user_means(-gains[mine] if common else gains[mine], sample.users[mine])
        differs = surely_gain(opposed, _ERRORS_OF_BUCKET)
        pay[bucket] = common != differs
    pay[0] = True  # without a support there is popularity only, whatever the weights
    return torch.where(pay[:, None], weights, _alone(weights))


def gains_of_parts(sample: Sample, initial: Tensor, *, seed: int) -> Tensor:
    """What weights searched on the other half of the users gain [E] over popularity alone."""
    half = half_of_users(sample.users, seed)
    gains = torch.zeros(len(half))
    for judged in (half, ~half):
        weights = _searched(sample.select(~judged), initial, lambda _done, _total: None)
        judges = sample.select(judged)
        gains[judged] = judges.figures(weights) - judges.figures(_alone(weights))
    return gains


def _alone(weights: Tensor) -> Tensor:
    """Weights of popularity alone, as many [B, 1 + P]."""
    alone = torch.zeros_like(weights)
    alone[:, 0] = 1.0
    return alone


def _searched(sample: Sample, initial: Tensor, progress: Progress) -> Tensor:
    """Weights [B, 1 + P], bucket by bucket where there are events to decide, initial ones elsewhere."""
    rows = []
    for bucket, row in enumerate(initial):
        weights = row
        mine = sample.buckets == bucket
        # without a support there is popularity only
        decides = bucket > 0 and bool(mine.any())
        if decides:
            weights = search(sample.scored[mine], sample.query[mine], sample.users[mine], weights, stream_figures)
        rows.append(weights)
        progress(len(rows), len(initial))
    return torch.stack(rows)


def sampled(ranker: Ranker, interactions: Interactions, first: int, unseen: Tensor, *, seed: int) -> Sample:
    """Events of mask `unseen` [all events] from number `first` on, replayed as a worker serves them."""
    history, chosen = History.of(interactions.users), _chosen(interactions, unseen, seed)
    position = history.position
    query = following(history, interactions.items, chosen, QUERY)
    if ranker.parameters.recommend_seen:  # parts find new items; that people return to the old ones is `repeats`'
        support = earlier(history, interactions.items, chosen, ranker.parameters.support_size)
        query = torch.where((query[:, :, None] == support[:, None]).any(2), -1, query)
    buckets = popularity.bucket_of(position[chosen])
    weights, scored = ranker.parameters.part_weights[buckets], []
    for now, side in epochs(ranker, interactions, first):
        within = torch.isin(chosen, now).nonzero()[:, 0]
        for chunk in torch.split(within, _CHUNK) if len(within) else ():
            tasks = side.tasks_before(chosen[chunk])
            scores = ranker.parts(tasks, side.priors)
            scored.append(scored_candidates(scores, tasks.excluded, query[chunk], weights[chunk]))
    if not scored:
        columns = min(_CANDIDATES, interactions.num_items) + QUERY
        return Sample(weights.new_zeros(0, weights.shape[1] + 1, columns), query, interactions.users[chosen], buckets)
    return Sample(torch.cat(scored), query, interactions.users[chosen], buckets)


def _chosen(interactions: Interactions, unseen: Tensor, seed: int) -> Tensor:
    """Numbers of the sampled events, ascending; none where no bucket of K has enough."""
    position, events = History.of(interactions.users).position, unseen.nonzero()[:, 0]
    samples = [events[sample_of_bucket(position[events], b, seed)] for b in range(popularity.NUM_BUCKETS)]
    return torch.cat(samples).sort().values


def scored_candidates(scores: Tensor, excluded: Tensor, query: Tensor, weights: Tensor) -> Tensor:
    """Parts' scores of candidates and of query items, and which of them must not count: [E, 1 + P + 1, C + Q].

    scores [E, 1 + P, N] from `Ranker.parts`, excluded [E, N] (-inf or 0), query [E, Q] (-1 = none), weights [E, 1 + P]
    that choose the candidates.
    """
    mixed = torch.einsum("ep,epn->en", weights, scores) + excluded
    best = mixed.topk(min(_CANDIDATES, mixed.shape[1]), 1)
    columns = torch.cat([best.indices, query.clamp(min=0)], 1)
    chosen = scores.gather(2, columns[:, None].expand(-1, scores.shape[1], -1))
    # a query item that is a candidate as well would tie with itself
    twice = (best.indices[:, :, None] == query[:, None]).any(2) | (best.values == -torch.inf)
    chosen[:, :, : best.indices.shape[1]].masked_fill_(twice[:, None], 0.0)
    return torch.cat([chosen, torch.cat([twice, torch.zeros_like(query, dtype=torch.bool)], 1)[:, None].float()], 1)


def stream_figures(scored: Tensor, query: Tensor, weights: Tensor) -> Tensor:
    """`stream_ndcg` [E] under weights [E, 1 + P]; `scored` from `scored_candidates`."""
    return stream_ndcg(_ranks(scored, query, weights))


def set_figures(scored: Tensor, query: Tensor, weights: Tensor) -> Tensor:
    """Set nDCG@10 [E] under weights [E, 1 + P]; `scored` from `scored_candidates`."""
    return set_ndcg(_ranks(scored, query, weights))


def _ranks(scored: Tensor, query: Tensor, weights: Tensor) -> Tensor:
    mixed = torch.einsum("ep,epc->ec", weights, scored[:, :-1]).masked_fill(scored[:, -1] > 0, -torch.inf)
    num_query = query.shape[1]
    column = torch.arange(mixed.shape[1] - num_query, mixed.shape[1]).expand_as(query)
    # absent query slots must not outrank anything
    mixed[:, -num_query:] = mixed[:, -num_query:].masked_fill(query < 0, -torch.inf)
    return query_ranks(mixed, torch.where(query >= 0, column, -1))


def objective(scored: Tensor, query: Tensor, users: Tensor, weights: Tensor, figures: Figures = set_figures) -> float:
    """Mean over users of figures under weights [1 + P]; `scored` from `scored_candidates`."""
    return float(user_means(figures(scored, query, weights.expand(len(query), -1)), users).mean())


def search(scored: Tensor, query: Tensor, users: Tensor, initial: Tensor, figures: Figures = set_figures) -> Tensor:
    """Better weights [1 + P] by coordinate moves, then half-way back to the initial ones (few users decide)."""
    weights = initial / initial.sum()
    best = objective(scored, query, users, weights, figures)
    for _ in range(_ROUNDS):
        before = best
        for part in range(len(weights)):
            for factor, addend in _MOVES:
                tried = weights.clone()
                tried[part] = tried[part] * factor + addend
                tried = tried / tried.sum()
                value = objective(scored, query, users, tried, figures)
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
