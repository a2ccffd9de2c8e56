"""Fitting the profile of repeats, and the weight of repeats against everything else by bucket of K.

The profile is the sum of one value per age and one per count, fitted together with one inverse temperature of the start
per bucket of K and the share of it that counts for what was had, by the likelihood of what comes next or soon (a
conditional logit, McFadden 1974): scores times temperature are nats, as the bonus is.
Letters: E events, S support slots, N items, A ages, C counts, B buckets of K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.figures import Interval, interval, query_ranks, set_ndcg, surely_gain, surest, user_means
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import exclusions
from models.repeats import COUNT_STARTS, LIMIT, SHAPE, bonuses, cells
from models.replay import Replay

_CELLS = 4_000_000  # events x items that are fitted on
# Precisions: of a value around that of few data (the log of the count, whatever the age; all of the start), and of a
# bucket's log temperature around the common one.
_NEAR_PRIOR, _NEAR_COMMON = 1.0, 3.0
_LOG_COUNTS = torch.log(torch.tensor([1.0, *COUNT_STARTS]))
_PARTS = (1.0, 0.7, 0.5, 0.3, 0.15)
_LEAST_EVENTS = 50
_BLOCK = 256


class Repeats(NamedTuple):
    """Profile [A, C] (zeros: off) and shares [B], temperatures [B] of the start, and what set nDCG@10 gains by it."""

    profile: Tensor
    shares: Tensor
    temperatures: Tensor
    gain: Interval


OFF = Repeats(torch.zeros(SHAPE), torch.ones(NUM_BUCKETS), torch.ones(NUM_BUCKETS), Interval(0.0, 0.0, 0.0))


def tune(replay: Replay, support: Tensor, *, seed: int) -> Repeats:
    """Fit on all events; on only if each half of the users gains by what the other half has fitted.

    Which likelihood to fit, of the very next item or of the next ten, is decided by that gain as well: a basket holds
    nothing twice, so what was had just now seldom comes next and often soon. `support` [E, S] are the supports before
    the replay's events; nothing that was had may be excluded in it.
    """
    slots = _Slots(support.clamp(min=0), torch.cat([cells(rows) for rows in torch.split(support, _BLOCK)]))
    there = torch.unique(replay.users)
    order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed))
    half = torch.isin(replay.users, there[order[: len(there) // 2]])
    queries = replay.targets[:, None], replay.query
    gains = [_judged(replay, slots, query, half, seed) for query in queries]
    best = max(range(len(queries)), key=lambda number: float(gains[number].mean()))
    gain = gains[best]
    if not surely_gain(gain):
        return OFF._replace(gain=interval(gain, seed=seed))
    found = _found(replay, slots, queries[best], torch.arange(len(support)), seed)
    return found._replace(gain=interval(gain, seed=seed))


def gains_of_listing(replay: Replay, support: Tensor, had: Tensor, found: Repeats) -> Tensor:
    """What set nDCG@10 gains by user [U] where lists may hold items that were had [E, X] (-1 = none).

    As for `tune`: supports [E, S], and nothing that was had is excluded in the replay.
    """
    gains = []
    for now in torch.split(torch.arange(len(support)), _BLOCK):
        start, slots = replay.start[now], _Slots(support[now].clamp(min=0), cells(support[now]))
        listed = _logits(start, bucket_of(replay.num_events[now]), slots, found)
        left_out = start + exclusions(had[now], start.shape[1])
        figures = [set_ndcg(query_ranks(scores, replay.query[now])) for scores in (listed, left_out)]
        gains.append(figures[0] - figures[1])
    return user_means(torch.cat(gains), replay.users)


class _Slots(NamedTuple):
    """Rows of the items in the support slots, 0 where none, and cells of the profile, -1 where none: [E, S]."""

    rows: Tensor
    cell: Tensor

    def select(self, numbers: Tensor) -> _Slots:
        """Keep the events with these numbers."""
        return _Slots(self.rows[numbers], self.cell[numbers])


def _judged(replay: Replay, slots: _Slots, query: Tensor, half: Tensor, seed: int) -> Tensor:
    """Gain by user, each half of the users [E] judging what the other half has fitted."""
    gains = []
    for fitted, judged in ((half, ~half), (~half, half)):
        found = _found(replay, slots, query, fitted.nonzero()[:, 0], seed)
        gains.append(_gain(replay, slots, judged.nonzero()[:, 0], found))
    return torch.cat(gains)


def _found(replay: Replay, slots: _Slots, query: Tensor, numbers: Tensor, seed: int) -> Repeats:
    """Repeats as the queries with these numbers would have them; the gain is left out."""
    return _ranked(replay, slots, numbers, _fit(replay, slots, query, numbers, seed))


def _fit(replay: Replay, slots: _Slots, query: Tensor, numbers: Tensor, seed: int) -> Repeats:
    """Repeats of the greatest penalised likelihood of the queries with these numbers."""
    most = max(1, _CELLS // replay.start.shape[1])
    generator = torch.Generator().manual_seed(seed)
    numbers = numbers[torch.randperm(len(numbers), generator=generator)[:most]]
    start, query, bucket = replay.start[numbers], query[numbers], bucket_of(replay.num_events[numbers])
    wanted = (query >= 0).float()
    wanted /= wanted.sum(1, keepdim=True)
    mine = slots.select(numbers)
    sizes = (*SHAPE, 1, NUM_BUCKETS, 1, 1)
    ages, counts, level, logs, common, apart = values = [torch.zeros(size, requires_grad=True) for size in sizes]

    def found() -> Repeats:
        profile = LIMIT * torch.tanh((ages[:, None] + level + counts + _LOG_COUNTS) / LIMIT)
        return OFF._replace(
            profile=profile, shares=1 + apart.expand(NUM_BUCKETS), temperatures=torch.exp(common + logs)
        )

    optimizer = torch.optim.LBFGS(values, max_iter=80, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = _logits(start, bucket, mine, found())
        near = sum(value.square().sum() for value in (ages, counts, apart)) + 0.1 * level.square().sum()
        penalty = _NEAR_PRIOR * near + _NEAR_COMMON * logs.square().sum()
        total: Tensor = penalty - (wanted * torch.log_softmax(logits, 1).gather(1, query.clamp(min=0))).sum()
        total.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch leaves it so
    with torch.no_grad():
        return found()


def _logits(start: Tensor, bucket: Tensor, slots: _Slots, found: Repeats) -> Tensor:
    """Logits [E, N] in nats from the start [E, N] and buckets of K [E]."""
    start = start * found.temperatures[bucket][:, None]
    had = start.gather(1, slots.rows)
    return start.scatter_add(1, slots.rows, bonuses(found.profile, found.shares[bucket], slots.cell, had))


def _ranked(replay: Replay, slots: _Slots, numbers: Tensor, found: Repeats) -> Repeats:
    """Temperatures of which each may be a part of the likeliest one, where lists are surely better for it.

    A list's few places are worth more to what is likely than the likelihood says. What the start says of items that
    were had stays as it is, so that only their places among the others move.
    """
    bucket, parts = bucket_of(replay.num_events[numbers]), torch.ones(NUM_BUCKETS)
    for number in range(NUM_BUCKETS):
        events = numbers[bucket == number]
        if len(events) < _LEAST_EVENTS:
            continue
        gains = [_gain(replay, slots, events, _with_parts(found, torch.full_like(parts, part))) for part in _PARTS]
        parts[number] = _PARTS[surest(torch.stack(gains))]
    return _with_parts(found, parts)


def _with_parts(found: Repeats, parts: Tensor) -> Repeats:
    """Temperatures times parts [B], for new items only."""
    return found._replace(temperatures=found.temperatures * parts, shares=found.shares / parts)


def _gain(replay: Replay, slots: _Slots, numbers: Tensor, found: Repeats) -> Tensor:
    """What the bonus adds to set nDCG@10, by user."""
    added = []
    for now in torch.split(numbers, _BLOCK):
        start = replay.start[now]
        again = _logits(start, bucket_of(replay.num_events[now]), slots.select(now), found)
        figures = [set_ndcg(query_ranks(scores, replay.query[now])) for scores in (again, start)]
        added.append(figures[0] - figures[1])
    return user_means(torch.cat(added), replay.users[numbers]) if added else torch.zeros(0)
