"""How far a version may be trusted in a scene that is new to it, learnt from scenes made new on purpose.

In a new scene (a shop, a language, a kind of goods) no item has been met: vectors come from texts, popularity begins at
nothing. What the parts then say is worth something, but less than at home: at full weight it ranks worse than plain
popularity for some K, which is negative transfer. So half of the items are treated as never met, texts are mapped by
the other half, and validation users say how much of the parts may count, as a share by bucket of K; the rest is
popularity. None counts unless it surely ranks better than none. Letters: N items, E events, B buckets of K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.episodes import Interactions
from models.figures import Interval, interval, query_ranks, set_ndcg, surest, user_means
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import Ranker
from models.replay import replay_side_by_side
from models.table_fitting import Window, text_ridge

SHARES = (0.0, 0.1, 0.25, 0.5)  # never all: a real scene lies further away than one made of known texts
LEAST_USERS = 20  # in a bucket of K; where there are fewer, all events of the scene decide
_MOST_LOGITS = 4_000_000  # events x items of the scene


class Shares(NamedTuple):
    """The chosen shares [B], and what they gain in set nDCG@10 over popularity alone in the scene made new."""

    by_bucket: Tensor
    gain: Interval


def tune(parameters: MetaParameters, window: Window, first: int, *, progress: Callable[[int, int], None]) -> Shares:
    """Choose among SHARES on the events from `first` on; `parameters` were fitted on those before."""
    draw = torch.Generator().manual_seed(window.seed)
    new = torch.rand(len(window.item_ids), generator=draw) < 0.5
    events = _events_of(window.interactions, new, first)
    if not len(events):
        return Shares(torch.zeros(NUM_BUCKETS), Interval(0.0, 0.0, 0.0))
    met = ~new
    vectors = torch.cat([parameters.item_out, parameters.item_in.flatten(1), parameters.item_factors], 1)
    mapped = text_ridge(window.text_embeddings[met], vectors[met], parameters.item_events[met])
    stranger = replace(parameters, text_map=mapped)
    tables = assemble_items(stranger, window.text_embeddings[new], torch.full((events.num_items,), -1))
    rankers = [Ranker(replace(stranger, scene_shares=torch.full((NUM_BUCKETS,), share)), tables) for share in SHARES]
    everything = torch.ones(len(events), dtype=torch.bool)
    replays = replay_side_by_side(rankers, events, 0, everything, progress)
    figures = torch.stack([set_ndcg(query_ranks(replay.start, replay.query)) for replay in replays])
    return _chosen(figures, replays[0].users, bucket_of(replays[0].num_events), window.seed)


def _events_of(interactions: Interactions, new: Tensor, first: int) -> Interactions:
    """The scene's events from number `first` on, items renumbered, as many as fit into memory."""
    later = (torch.arange(len(interactions)) >= first) & new[interactions.items]
    number = torch.cumsum(new, 0) - 1
    events = interactions.select(later.nonzero()[: _MOST_LOGITS // max(int(new.sum()), 1), 0])
    return replace(events, items=number[events.items], num_items=int(new.sum()))


def _chosen(figures: Tensor, users: Tensor, buckets: Tensor, seed: int) -> Shares:
    """For each bucket the surest of the shares, by figures [shares, E]."""
    common = surest(user_means(figures, users))
    chosen = torch.full((NUM_BUCKETS,), common)
    for bucket in torch.unique(buckets).tolist():
        mine = buckets == bucket
        if len(torch.unique(users[mine])) >= LEAST_USERS:
            chosen[bucket] = surest(user_means(figures[:, mine], users[mine]))
    gained = figures.gather(0, chosen[buckets][None])[0] - figures[0]
    return Shares(torch.tensor(SHARES)[chosen], interval(user_means(gained, users), seed=seed))
