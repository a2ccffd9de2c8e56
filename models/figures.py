"""How good a ranking is: ranks of the next items, set nDCG@10, means over users, intervals by bootstrap.

Letters: E events, N items, Q query slots, U users.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CUTOFF = 10
_BLOCK = 128


class Interval(NamedTuple):
    """A mean over users with its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """Round to five places, for reports."""
        return [round(value, 5) for value in self]


def query_ranks(scores: Tensor, query: Tensor) -> Tensor:
    """1-based ranks [E, Q] of query items [E, Q] (-1 = none, rank 0) in scores [E, N]; ties get their mean rank."""
    blocks = zip(torch.split(scores, _BLOCK), torch.split(query, _BLOCK), strict=True)
    return torch.cat([_block_ranks(rows, asked) for rows, asked in blocks])


def _block_ranks(scores: Tensor, query: Tensor) -> Tensor:
    """Ranks of events that fit into the processor's cache; comparisons as floats are faster to sum than booleans."""
    own, flags = scores.gather(1, query.clamp(min=0)), torch.empty_like(scores)
    ranks = torch.empty_like(own)
    for slot in range(query.shape[1]):
        column = own[:, slot : slot + 1]
        ahead = torch.gt(scores, column, out=flags).sum(1)
        ranks[:, slot] = 1.0 + ahead + (torch.eq(scores, column, out=flags).sum(1) - 1) / 2
    return torch.where(query >= 0, ranks, 0.0)


def set_ndcg(ranks: Tensor) -> Tensor:
    """nDCG@10 [E] of the query as a set, from ranks [E, Q] (0 = no item)."""
    gain = torch.where((ranks > 0) & (ranks <= CUTOFF), 1.0 / torch.log2(1.0 + ranks.clamp(min=1.0)), 0.0)
    ideal = torch.cumsum(1.0 / torch.log2(torch.arange(CUTOFF) + 2.0), 0)
    size = (ranks > 0).sum(1).clamp(1, CUTOFF)
    return gain.sum(1) / ideal[size - 1]


def stream_ndcg(ranks: Tensor) -> Tensor:
    """Mean of nDCG@10 of the query as a set and of its first item alone [E]: a stream is judged by both."""
    return (set_ndcg(ranks) + set_ndcg(ranks[:, :1])) / 2


def user_means(values: Tensor, users: Tensor) -> Tensor:
    """Mean of values [..., E] over each user's events: [..., U] in ascending order of user."""
    numbers, inverse = torch.unique(users, return_inverse=True)
    total = values.new_zeros(*values.shape[:-1], len(numbers)).index_add_(-1, inverse, values)
    return total / torch.bincount(inverse, minlength=len(numbers))


def interval(values: Tensor, *, seed: int = 0, draws: int = 1000) -> Interval:
    """Mean of values [U] and its interval; (0, 0, 0) without values."""
    if len(values) == 0:
        return Interval(0.0, 0.0, 0.0)
    generator = torch.Generator().manual_seed(seed)
    means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(means, means.new_tensor([0.025, 0.975])).tolist()
    return Interval(float(values.mean()), low, high)


def standard_error(gains: Tensor) -> Tensor:
    """Of the mean over users of gains [..., U]; infinite for one user, who has no spread to tell chance by."""
    num = gains.shape[-1]
    return gains.std(-1) / num**0.5 if num > 1 else gains.new_full(gains.shape[:-1], torch.inf)


def surely_gain(gains: Tensor, errors: float = 1.0) -> bool:
    """Whether the mean of users' gains [U] is above so many standard errors."""
    return len(gains) > 0 and float(gains.mean()) > errors * float(standard_error(gains))


def surest(figures: Tensor) -> int:
    """Of several settings' figures [G, U] the one whose gain over the first is surest; the first unless it is likely.

    Judged by the mean gain over users less its standard error.
    """
    gains = figures - figures[0]
    least = gains.mean(1) - standard_error(gains)
    best = int(least.argmax())
    return best if float(least[best]) > 0 else 0


def half_of(num: int, seed: int) -> Tensor:
    """Mask [num] of a random half."""
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed)) % 2 == 0


def half_of_users(users: Tensor, seed: int) -> Tensor:
    """Mask [E] of the events of a random half of the users."""
    found, number = torch.unique(users, return_inverse=True)
    return half_of(len(found), seed)[number]


def judged_by_halves(gains: Tensor, seed: int) -> tuple[Tensor, int]:
    """Two-fold cross-validation over users of settings' gains [G, U].

    Gives the gain [U] of each half under the setting that the other half has chosen, and the choice of all together.
    """
    half = half_of(gains.shape[1], seed)
    return torch.where(half, gains[_steadiest(gains[:, ~half])], gains[_steadiest(gains[:, half])]), _steadiest(gains)


def _steadiest(gains: Tensor) -> int:
    """The setting whose mean gain, less its standard error, is largest: steady small steps before lucky large ones."""
    return int((gains.mean(1) - standard_error(gains)).argmax())
