"""How fast popularity is forgotten: the half-life under which it ranks what newcomers take best.

A shop where little changes gains by counting long, one with seasons or news by counting short; how many events that is
hangs on how many there are a day. Letters: E events, N items, B buckets of K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models import popularity
from models.episodes import History, Interactions, drawn_from, earlier, following
from models.figures import Interval, interval, query_ranks, standard_error, stream_ndcg, user_means
from models.ranker import exclusions
from models.replay import QUERY

HALF_LIVES = (1_000.0, 4_000.0, 16_000.0, 64_000.0, 256_000.0)
MOST_JUDGED = 16_000  # events, at random
_ERRORS = 3.0  # users of one season err together, and a wrong one can cost a third of a popular list
_BLOCK = 256


class Tuned(NamedTuple):
    """The half-life, in events, and what it gains over the one before on validation users."""

    half_life: float
    gain: Interval


def tune(
    interactions: Interactions,
    first: int,
    unseen: Tensor,
    before: float,
    *,
    recommend_seen: bool,
    seed: int,
    progress: Callable[[int, int], None],
) -> Tuned:
    """Choose among HALF_LIVES by the events of mask `unseen` [all events] from number `first` on, counts moving.

    The one of `before` stays unless another gains by more than three standard errors over users (mean of the set's and
    the next item's nDCG@10 of popularity alone).
    """
    half_lives = [before, *(one for one in HALF_LIVES if one != before)]
    judged = drawn_from(unseen, MOST_JUDGED, seed)
    figures, users = [], interactions.users[judged.nonzero()[:, 0]]
    for number, half_life in enumerate(half_lives):
        progress(number, len(half_lives))
        found = _figures(interactions, first, judged, half_life, recommend_seen=recommend_seen)
        figures.append(user_means(found, users))
    progress(len(half_lives), len(half_lives))
    gains = torch.stack(figures) - figures[0]
    best = int((gains.mean(1) - _ERRORS * standard_error(gains)).argmax())
    return Tuned(half_lives[best], interval(gains[best], seed=seed))


def _figures(
    interactions: Interactions, first: int, judged: Tensor, half_life: float, *, recommend_seen: bool
) -> Tensor:
    """nDCG@10 [E] of popularity alone for the judged events; counts move as a worker lets them."""
    history, num_items = History.of(interactions.users), interactions.num_items
    buckets = popularity.bucket_of(history.position)
    nothing = torch.zeros(popularity.NUM_BUCKETS, num_items)
    counts = popularity.advance(nothing, buckets[:first], interactions.items[:first], half_life=half_life)
    figures = [torch.zeros(0)]
    for now in torch.split(torch.arange(first, len(interactions)), popularity.POPULARITY_EPOCH):
        priors = popularity.priors(counts)
        for events in torch.split(now[judged[now]], _BLOCK):
            scores = priors[buckets[events]]
            if not recommend_seen and len(events):
                had = earlier(history, interactions.items, events, int(history.position[events].max()))
                scores = scores + exclusions(had, num_items)
            query = following(history, interactions.items, events, QUERY)
            figures.append(stream_ndcg(query_ranks(scores, query)))
        counts = popularity.advance(counts, buckets[now], interactions.items[now], half_life=half_life)
    return torch.cat(figures)
