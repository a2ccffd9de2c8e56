"""Whose events validation judges: users who come later than what is fitted on, as many as memory holds."""

from __future__ import annotations

import torch
from torch import Tensor

from models.episodes import History, Interactions

FIT_SHARE = 0.75  # of the users by first event; the others' first events begin the later part
# Validation events x items kept in memory: whether an inner step pays is decided by some .002 of nDCG, which half the
# validation users of MovieLens-100K cannot tell from nothing (four bytes each).
MAX_LOGITS = 36_000_000
SHARED_LOGITS = 12_000_000  # the same for all memories' replays together, and for repeats
LEAST_USERS = 20  # that decide anything; with fewer whole ones in memory, more of them are kept in part


def split(interactions: Interactions, share: float = FIT_SHARE) -> tuple[int, Tensor]:
    """Number of the event that begins the later part, and a mask of the later part's events by users unseen before."""
    first = (History.of(interactions.users).position == 0).nonzero()[:, 0]
    cut = int(first[min(int(share * len(first)), len(first) - 1)])
    number = torch.arange(len(interactions))
    unseen = ~torch.isin(interactions.users, interactions.users[:cut]) & (number >= cut)
    return cut, unseen


def limited(interactions: Interactions, mask: Tensor, seed: int, most_logits: int = MAX_LOGITS) -> Tensor:
    """Keep whole users, at random, as long as their predictions fit into memory.

    Where these would be fewer than LEAST_USERS (a large catalogue, long histories), the first events of so many are
    kept: what holds for three people holds for nobody else.
    """
    most = most_logits // interactions.num_items
    users, number, counts = torch.unique(interactions.users[mask], return_inverse=True, return_counts=True)
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(seed))
    num, length = int((torch.cumsum(counts[order], 0) <= most).sum()), len(number)
    if num < LEAST_USERS:
        num = min(LEAST_USERS, len(users))
        length = _shared(counts[order[:num]], most)
    kept = mask.clone()
    kept[mask] = torch.isin(number, order[:num]) & (History.of(number).position < length)
    return kept


def _shared(counts: Tensor, most: int) -> int:
    """How many events each may have, at least one, if those with fewer leave the rest to the others."""
    lengths = counts.sort().values
    room = most - torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]])  # once all shorter ones are whole
    shares = room // torch.arange(len(lengths), 0, -1)
    short = shares < lengths
    return max(1, int(shares[short.nonzero()[0, 0]] if bool(short.any()) else lengths[-1]))
