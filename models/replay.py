"""Replay a stream offline: the start's prediction before each event of some users, and what follows from it.

Honest residuals need the start only, so all predictions are made in large batches and the inner states follow by a
scan; popularity and pairs move as in a worker. Letters: E events, N items, Q query slots, F factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models import pair_counts, popularity
from models.episodes import History, Interactions, earlier, following
from models.item_tables import initial_counts
from models.logit_reading import LOSS_LIMIT
from models.neighbours import Blocks, Neighbours, PairLayout, initial_pairs, stakes_of
from models.pair_counts import WINDOW, PairTable, learn
from models.ranker import Ranker, TaskBatch, exclusions

QUERY = 10
_CHUNK = 128
_BLOCK = 1024


@dataclass(frozen=True)
class Replay:
    """Predictions for E events in time order.

    Attributes:
        start: [E, N] the start's logits before the event, -inf where the user had the item and nobody repeats.
        targets: [E] the event's item.
        query: [E, Q] the items of this and the user's next events, -1 where none.
        users: [E].
        num_events: [E] K.
        events: [E] numbers of the events.

    """

    start: Tensor
    targets: Tensor
    query: Tensor
    users: Tensor
    num_events: Tensor
    events: Tensor

    def select(self, mask: Tensor) -> Replay:
        """Keep the events of a mask [E]."""
        return Replay(**{name: column[mask] for name, column in vars(self).items()})


class ItemSide:
    """What moves on the item side of one partition: position popularity, and pairs where the version lets them."""

    def __init__(self, ranker: Ranker, interactions: Interactions, *, pairs_online: bool | None = None) -> None:
        """Begin with what the version brings; its items and the interactions' have the same rows."""
        parameters = ranker.parameters
        self.history = History.of(interactions.users)
        self._ranker, self._interactions, self._half_life = ranker, interactions, parameters.half_life
        self._buckets = popularity.bucket_of(self.history.position)
        self._counts = initial_counts(parameters, ranker.items.trained_index)
        self.priors = popularity.priors(self._counts)  # [B, N]
        self._rows = torch.arange(ranker.items.num_items)
        self._stakes = stakes_of(parameters)
        self._pairs: PairTable | None = None
        self._waiting = torch.zeros(0, dtype=torch.int64)  # events that pairs have still to count
        if parameters.pairs_online if pairs_online is None else pairs_online:
            self._pairs = self._begin(ranker)

    def advance(self, events: Tensor) -> None:
        """Let the events of one of popularity's epochs take effect; pairs follow once theirs is full."""
        items = self._interactions.items[events]
        self._counts = popularity.advance(self._counts, self._buckets[events], items, half_life=self._half_life)
        self.priors = popularity.priors(self._counts)
        if self._pairs is not None:
            self._waiting = torch.cat([self._waiting, events])
            if len(self._waiting) >= pair_counts.PAIR_EPOCH:
                self._count(self._pairs, self._waiting)
                self._waiting = self._waiting[:0]

    def tasks_before(self, events: Tensor) -> TaskBatch:
        """`tasks_before`, with the pairs as they are now."""
        tasks = tasks_before(self._ranker, self._interactions, self.history, events)
        if self._pairs is not None:
            tasks.neighbours = Neighbours(Blocks(*self._block, (self._layout.moved,)), torch.zeros_like(events))
        return tasks

    def _count(self, pairs: PairTable, events: Tensor) -> None:
        items = self._interactions.items
        before = earlier(self.history, items, events, min(WINDOW, self._ranker.parameters.support_size))
        self._write(pairs, learn(pairs, before, items[events], self._stakes))

    def _begin(self, ranker: Ranker) -> PairTable:
        tables, trained = ranker.items, ranker.items.trained_index
        number_of = torch.full((len(ranker.parameters.item_ids),), -1)
        number_of[trained[trained >= 0]] = self._rows[trained >= 0]
        pairs = initial_pairs(ranker.parameters, number_of, tables.num_items)
        self._layout = PairLayout(tables)
        self._block = tables.neighbour_items.clone(), tables.neighbour_values.clone()
        self._write(pairs, self._rows)
        return pairs

    def _write(self, pairs: PairTable, changed: Tensor) -> None:
        self._layout.write(self._block, pairs, changed, (self._rows, self._rows))


class Moments(NamedTuple):
    """The prediction in item space, whatever the factors: mean of (target - prediction) [N], mean covariance [N, N]."""

    item_bias: Tensor
    covariance: Tensor


def replay_start(
    ranker: Ranker, interactions: Interactions, first: int, chosen: Tensor, progress: Callable[[int, int], None]
) -> Replay:
    """Predict the events of mask `chosen` [all events] from number `first` on; earlier ones are history only."""
    return replay_side_by_side([ranker], interactions, first, chosen, progress)[0]


def replay_side_by_side(
    rankers: Sequence[Ranker],
    interactions: Interactions,
    first: int,
    chosen: Tensor,
    progress: Callable[[int, int], None],
) -> list[Replay]:
    """The same for rankers over the same tables, which weigh supports differently: all else is prepared once."""
    tracks = [_tracks(ranker, interactions, first, chosen) for ranker in rankers]
    starts, events = [list[Tensor]() for _ in rankers], list[Tensor]()
    for chunk, tasks, priors in _asked(rankers[0], interactions, first, chosen):
        begin = sum(map(len, events))
        for start, ranker, track in zip(starts, rankers, tracks, strict=True):
            start.append(ranker.start(replace(tasks, track=track[begin : begin + len(chunk)]), priors))
        events.append(chunk)
        progress(int(chunk[-1]) + 1 - first, len(interactions) - first)
    progress(len(interactions) - first, len(interactions) - first)
    at, history = torch.cat(events), History.of(interactions.users)
    query = following(history, interactions.items, at, QUERY)
    columns = interactions.items[at], query, interactions.users[at], history.position[at], at
    return [Replay(torch.cat(start), *columns) for start in starts]


def _asked(
    ranker: Ranker, interactions: Interactions, first: int, chosen: Tensor
) -> Iterator[tuple[Tensor, TaskBatch, Tensor]]:
    """Event numbers of the mask from `first` on, some at a time, with the tasks before them and the priors [B, N]."""
    for now, side in epochs(ranker, interactions, first):
        for chunk in torch.split(now[chosen[now]], _CHUNK):
            if len(chunk):
                yield chunk, side.tasks_before(chunk), side.priors


def _tracks(ranker: Ranker, interactions: Interactions, first: int, chosen: Tensor) -> Tensor:
    """`TaskBatch.track` before each of these events [E, M] as far as memories go, from these events alone."""
    events = chosen.nonzero()[:, 0]
    events = events[events >= first]
    track = torch.zeros(len(events), ranker.track_size)
    if ranker.track_size > 1:
        earned = [
            ranker.memory_gains(tasks, priors, interactions.items[chunk])
            for chunk, tasks, priors in _asked(ranker, interactions, first, chosen)
        ]
        discount = ranker.parameters.memory_discount
        track[:, 1:] = states_before(interactions.users[events], torch.cat(earned), discount)[0]
    return track


def epochs(
    ranker: Ranker, interactions: Interactions, first: int, *, pairs_online: bool | None = None
) -> Iterator[tuple[Tensor, ItemSide]]:
    """Event numbers from `first` on, an epoch of popularity at a time, and the item side as it is then (one object)."""
    side = ItemSide(ranker, interactions, pairs_online=pairs_online)
    for now in torch.split(torch.arange(first, len(interactions)), popularity.POPULARITY_EPOCH):
        yield now, side
        side.advance(now)


def tasks_before(ranker: Ranker, interactions: Interactions, history: History, events: Tensor) -> TaskBatch:
    """The tasks as they stand before each of `events` [U], with empty inner states."""
    num, slots, num_items = len(events), ranker.parameters.support_size, ranker.items.num_items
    position = history.position[events]
    place = history.place[events][:, None] + torch.arange(-slots, 0)
    had = earlier(history, interactions.items, events, int(position.max()))
    return TaskBatch(
        support=earlier(history, interactions.items, events, slots),
        weights=interactions.weights[history.order[place.clamp(min=0)]],
        num_events=position,
        state=torch.zeros(num, ranker.state_size),
        state_events=torch.zeros(num, dtype=torch.int64),
        track=torch.zeros(num, ranker.track_size),
        excluded=torch.zeros(num, num_items) if ranker.parameters.recommend_seen else exclusions(had, num_items),
        prior_rows=popularity.bucket_of(position),
    )


def start_losses(replay: Replay, tau: float) -> Tensor:
    """Losses [E] of what happened under softmax(tau * start), capped."""
    blocks = zip(torch.split(replay.start, _BLOCK), torch.split(replay.targets, _BLOCK), strict=True)
    own = [torch.log_softmax(tau * start, 1).gather(1, targets[:, None])[:, 0] for start, targets in blocks]
    return (-torch.cat(own)).clamp(max=LOSS_LIMIT)


def prediction_moments(replay: Replay, tau: float) -> Moments:
    """Moments of softmax(tau * start): factors [N, F] have residual mean `item_bias @ F`, metric `F' covariance F`."""
    num, num_items = replay.start.shape
    mass, square = torch.zeros(num_items), torch.zeros(num_items, num_items)
    for begin in range(0, num, _BLOCK):
        prediction = torch.softmax(tau * replay.start[begin : begin + _BLOCK], 1)
        mass += prediction.sum(0)
        square.addmm_(prediction.T, prediction)
    seen = torch.bincount(replay.targets, minlength=num_items).float()
    return Moments((seen - mass) / num, (torch.diag(mass) - square) / num)


def honest_residuals(replay: Replay, factors: Tensor, tau: float) -> Tensor:
    """Residuals [E, F] of softmax(tau * start) for factors [N, F]."""
    expected = [
        torch.softmax(tau * replay.start[begin : begin + _BLOCK], 1) @ factors
        for begin in range(0, len(replay.targets), _BLOCK)
    ]
    return factors[replay.targets] - torch.cat(expected)


def states_before(users: Tensor, residuals: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """Inner state [E, F] and its count [E] before each event, from residuals [E, F] of events in time order."""
    history = History.of(users)
    state = torch.zeros_like(residuals)
    by_position = torch.argsort(history.position, stable=True)
    sizes = torch.bincount(history.position).tolist()
    for rows in torch.split(by_position, sizes)[1:]:
        before = history.order[history.place[rows] - 1]
        state[rows] = discount * state[before] + residuals[before]
    return state, history.position
