"""Fitting the profile of repeats, and the weight of repeats against everything else by bucket of K.

The profile is the sum of one value per age and one per count, fitted together with one inverse temperature of the start
per bucket of K, by the likelihood of validation users' next items (a conditional logit, McFadden 1974): scores times
temperature are nats, as the bonus is. Letters: E events, S support slots, N items, A ages, C counts, B buckets of K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.figures import Interval, interval, query_ranks, set_ndcg, user_means
from models.popularity import NUM_BUCKETS, bucket_of
from models.repeats import LIMIT, SHAPE, bonuses, cells
from models.replay import Replay

_CELLS = 4_000_000  # events x items that are fitted on
_RIDGE, _NEAR = 0.3, 10.0  # precision of a value around none, and of a bucket's log temperature around the common one
_BLOCK = 256


class Repeats(NamedTuple):
    """profile [A, C] (zeros: off), temperatures [B] of the start, and what the bonus gains in set nDCG@10."""

    profile: Tensor
    temperatures: Tensor
    gain: Interval


OFF = Repeats(torch.zeros(SHAPE), torch.ones(NUM_BUCKETS), Interval(0.0, 0.0, 0.0))


def tune(replay: Replay, support: Tensor, *, seed: int) -> Repeats:
    """Fit on all events; on only if each half of the users gains by what the other half has fitted.

    `support` [E, S] are the supports before the replay's events; nothing that was had may be excluded in it.
    """
    cell = torch.cat([cells(rows) for rows in torch.split(support, _BLOCK)])
    rows = support.clamp(min=0)
    there = torch.unique(replay.users)
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))
    half = torch.isin(replay.users, there[order[: len(there) // 2]])
    gains = []
    for fitted, judged in ((half, ~half), (~half, half)):
        numbers = judged.nonzero()[:, 0]
        found = _fit(replay, rows, cell, fitted.nonzero()[:, 0], seed)
        gains.append(_gain(replay, rows, cell, numbers, found))
    gain = torch.cat(gains)
    if len(gain) < 2 or float(gain.mean()) <= float(gain.std()) / len(gain) ** 0.5:
        return OFF._replace(gain=interval(gain, seed=seed))
    return Repeats(*_fit(replay, rows, cell, torch.arange(len(rows)), seed), interval(gain, seed=seed))


def _fit(replay: Replay, rows: Tensor, cell: Tensor, numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Profile [A, C] and temperatures [B] of the greatest penalised likelihood of the events with these numbers."""
    most = max(1, _CELLS // replay.start.shape[1])
    generator = torch.Generator().manual_seed(seed)
    numbers = numbers[torch.randperm(len(numbers), generator=generator)[:most]]
    start, target, bucket = replay.start[numbers], replay.targets[numbers], bucket_of(replay.num_events[numbers])
    rows, cell = rows[numbers], cell[numbers]
    ages, counts = (torch.zeros(size, requires_grad=True) for size in SHAPE)
    logs, common = torch.zeros(NUM_BUCKETS, requires_grad=True), torch.zeros(1, requires_grad=True)
    values = [ages, counts, logs, common]
    optimizer = torch.optim.LBFGS(values, max_iter=80, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        profile = _profile(ages, counts)
        logits = (torch.exp(common + logs)[bucket][:, None] * start).scatter_add(1, rows, bonuses(profile, cell))
        penalty = _RIDGE * (ages.square().sum() + counts.square().sum()) + _NEAR * logs.square().sum()
        total: Tensor = torch.nn.functional.cross_entropy(logits, target, reduction="sum") + penalty
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch leaves it so
    return _profile(ages, counts).detach(), torch.exp(common + logs).detach()


def _profile(ages: Tensor, counts: Tensor) -> Tensor:
    """Bounded smoothly, so that a fit can come back from the limit."""
    return LIMIT * torch.tanh((ages[:, None] + counts) / LIMIT)


def _gain(replay: Replay, rows: Tensor, cell: Tensor, numbers: Tensor, found: tuple[Tensor, Tensor]) -> Tensor:
    """What the bonus adds to set nDCG@10, by user."""
    profile, temperatures = found
    added = []
    for now in torch.split(numbers, _BLOCK):
        start = replay.start[now] * temperatures[bucket_of(replay.num_events[now])][:, None]
        again = start.scatter_add(1, rows[now], bonuses(profile, cell[now]))
        figures = [set_ndcg(query_ranks(scores, replay.query[now])) for scores in (again, start)]
        added.append(figures[0] - figures[1])
    return user_means(torch.cat(added), replay.users[numbers]) if added else torch.zeros(0)
