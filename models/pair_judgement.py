"""Whether counting item pairs online pays, on users that were not fitted.

What is counted online has little to show in a short stream, and a version serves a long one. So this is judged by
tables of the window's first half of the users, over a stream about as long as what they were fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.episodes import Interactions, drawn_from, following
from models.figures import Interval, interval, query_ranks, set_ndcg, surely_gain, user_means
from models.ranker import Ranker
from models.replay import QUERY, epochs

FIT_SHARE = 0.5
MOST_SCORES = 20_000_000  # judged events x items
_CHUNK = 128


class Judged(NamedTuple):
    """What users gain in set nDCG@10 under the start, and whether it is more than a standard error."""

    gain: Interval
    pays: bool


def judge(
    ranker: Ranker,
    interactions: Interactions,
    first: int,
    unseen: Tensor,
    progress: Callable[[int, int], None],
    *,
    seed: int,
) -> Judged:
    """Compare pairs as they are counted with those of the version, paired by user.

    `unseen` [all events]: events that may be judged, from number `first` on; at random as many as cost allows.
    """
    chosen = drawn_from(unseen, MOST_SCORES // interactions.num_items, seed)
    figures, done, most = list[Tensor](), 0, 2 * int(chosen.sum())
    for pairs_online in (True, False):
        for some in _figures(ranker, interactions, first, chosen, pairs_online=pairs_online):
            figures.append(some)
            done += len(some)
            progress(done, most)
    online, brought = torch.cat(figures).chunk(2)
    gains = user_means(online - brought, interactions.users[chosen])
    return Judged(interval(gains, seed=seed), surely_gain(gains))


def _figures(
    ranker: Ranker, interactions: Interactions, first: int, chosen: Tensor, *, pairs_online: bool
) -> Iterator[Tensor]:
    """Set nDCG@10 of the start before the chosen events, in their order, some at a time."""
    for now, side in epochs(ranker, interactions, first, pairs_online=pairs_online):
        for events in torch.split(now[chosen[now]], _CHUNK):
            if len(events):
                start = ranker.start(side.tasks_before(events), side.priors)
                yield set_ndcg(query_ranks(start, following(side.history, interactions.items, events, QUERY)))
