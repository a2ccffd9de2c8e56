"""A new item's vector moves with what its takers had taken and how fast they come, the more the more they are.

The context of an item is the mean vector of the items that it was counted with (`models.pair_counts`): as with word
vectors, an item is known by the company it keeps. Its pace is how many took it within the time from its first taker to
its latest, as a logarithm, shrunk towards what is usual as if by one taker more:

    move = n / (n + PSEUDO_EVENTS) * map(context) + pace * direction,   pace = log(n / (1 + usual * time))

Map and direction are fitted on known items that are treated as new, to what the text misses of the learnt out-vector.
A vector moves with takers only, so silence after the latest one tells nothing here: popularity, which decays, sees it.
Everything follows from the counted pairs and is stored nowhere else.

Letters: n items, D item-item dimensions, V dimensions of a context's vectors, M pairs kept per item, R rows.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.episodes import History, Interactions, earlier
from models.figures import judged_by_halves, surely_gain
from models.meta_parameters import MetaParameters
from models.pair_counts import WINDOW, PairTable, Stakes, empty, learn

PSEUDO_EVENTS = 5.0
MOST_EVENTS = 10  # of an item that is treated as new
KNOWN_EVENTS = 20  # of an item whose learnt vector is more than noise
LEAST_ITEMS = 50  # with a context; fewer decide nothing
RIDGES = (30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)
_BLOCK = 4096  # events counted at once


class Motion(NamedTuple):
    """How out-vectors of new items move: not at all where `company` has no rows.

    company: [V + 1, D] from a context (and 1) that is wholly trusted. pace: [D] for each e-fold of pace; zeros where
    pace tells nothing. usual_pace: takers of an item for each taker of any item.
    """

    company: Tensor
    pace: Tensor
    usual_pace: float

    @classmethod
    def of(cls, parameters: MetaParameters) -> Motion:
        """That of a version."""
        return cls(parameters.context_map, parameters.pace_direction, parameters.usual_pace)

    @classmethod
    def none(cls, dims: int) -> Motion:
        """Vectors of D dimensions by text alone."""
        return cls(torch.zeros(0, dims), torch.zeros(dims), 1.0)

    def fields(self) -> dict[str, Any]:
        """Give the fields of meta-parameters that say so."""
        return {"context_map": self.company, "pace_direction": self.pace, "usual_pace": self.usual_pace}


class Takers(NamedTuple):
    """Of each item [R]: its takers, and the time from the first to the latest on the clock of `PairTable`."""

    number: Tensor
    time: Tensor

    @classmethod
    def of(cls, table: PairTable, rows: Tensor) -> Takers:
        """Of rows [R] of a table that began without them."""
        return cls(table.users[rows], table.latest[rows] - table.arrived[rows])

    def trust(self) -> Tensor:
        """Give the trust in a context [R]."""
        number = self.number.double()
        return number / (number + PSEUDO_EVENTS)

    def pace(self, usual: float) -> Tensor:
        """Give the logarithm [R] of the pace over the usual one; 0 without a taker."""
        return (self.number.double().clamp(min=1.0) / (1.0 + usual * self.time.double())).log()


def contexts(others: Tensor, counts: Tensor, vectors: Tensor) -> Tensor:
    """Mean vector [R, V] of the items counted with each row; others [R, M] rows of vectors, -1 = none, counts [R, M].

    In double precision, so that a row does not depend on which others are computed beside it.
    """
    weights = torch.where(others >= 0, counts, 0.0).double()
    total = torch.einsum("rm,rmv->rv", weights, vectors[others.clamp(min=0)].double())
    return total / weights.sum(1, keepdim=True).clamp(min=1e-9)


def moves(found: Tensor, takers: Takers, motion: Motion) -> Tensor:
    """What contexts [R, V] and takers add to out-vectors: [R, D]."""
    company = torch.cat([found, found.new_ones(len(found), 1)], 1).double() @ motion.company.double()
    pace = takers.pace(motion.usual_pace)
    return (takers.trust()[:, None] * company + pace[:, None] * motion.pace.double()).float()


def fit_motion(
    interactions: Interactions, stakes: Stakes, vectors: Tensor, missed: Tensor, *, num_pairs: int, seed: int
) -> Motion:
    """Fit from contexts over vectors [n, V] and paces to what the text misses of out-vectors, `missed` [n, D].

    Half of the items at a time are treated as new: MOST_EVENTS of each are counted. The ridge, and whether pace counts,
    are chosen by how much nearer items come that were not fitted on; nothing moves unless those of each half surely do
    with what the other half has chosen.
    """
    half = torch.rand(len(missed), generator=torch.Generator().manual_seed(seed)) < 0.5
    tables = [_counted(interactions, stakes, new, num_pairs) for new in (half, ~half)]
    others, counts = (torch.where(half[(...,) + (None,) * (one.dim() - 1)], one, other) for one, other in
                      ((tables[0].others, tables[1].others), (tables[0].counts, tables[1].counts)))  # fmt: skip
    events = torch.bincount(interactions.items, minlength=len(missed))
    known, takers = (others >= 0).any(1) & (events >= KNOWN_EVENTS), _latest_takers(interactions)
    if int(known[half].sum()) < LEAST_ITEMS or int(known[~half].sum()) < LEAST_ITEMS:
        return Motion.none(missed.shape[1])
    usual = float((takers.number / (1.0 + takers.time)).log()[known].mean().exp())
    cases = _Cases(contexts(others, counts[..., 0], vectors).float(), takers, missed)
    settings = list(product(RIDGES, (True, False)))
    nearer = torch.zeros(len(settings), len(missed))
    for judges, number in product((half & known, ~half & known), range(len(settings))):
        motion = cases.select(known & ~judges).solved(*settings[number], usual)
        nearer[number, judges] = cases.select(judges).nearer(motion)
    judged, chosen = judged_by_halves(nearer[:, known], seed)
    return cases.select(known).solved(*settings[chosen], usual) if surely_gain(judged) else Motion.none(missed.shape[1])


class _Cases(NamedTuple):
    """Known items treated as new: contexts [R, V], takers, and what the text misses of each [R, D]."""

    found: Tensor
    takers: Takers
    missed: Tensor

    def select(self, mask: Tensor) -> _Cases:
        return _Cases(self.found[mask], Takers(*(column[mask] for column in self.takers)), self.missed[mask])

    def solved(self, ridge: float, with_pace: bool, usual: float) -> Motion:  # a setting of the two
        """Ridge on contexts of unit spread, beside a direction of pace that is not shrunk; no intercept.

        What is missed on average is the text map's, which has been fitted on other items here.
        """
        middle, spread = self.found.mean(0), self.found.std(0).mean().clamp(min=1e-9)
        trust, pace = self.takers.trust().float()[:, None], self.takers.pace(usual).float()[:, None]
        inputs = torch.cat([trust * (self.found - middle) / spread, (pace - pace.mean()) * with_pace], 1)
        penalty = torch.full((inputs.shape[1],), ridge)
        penalty[-1] = 1e-3
        normal = inputs.T @ inputs + torch.diag(penalty)
        solution: Tensor = torch.linalg.solve(normal, inputs.T @ (self.missed - self.missed.mean(0)))
        slope = solution[:-1] / spread
        return Motion(torch.cat([slope, -(middle @ slope)[None]]), solution[-1], usual)

    def nearer(self, motion: Motion) -> Tensor:
        """How much smaller the squared error [R] is with these moves."""
        left = self.missed - moves(self.found, self.takers, motion)
        return self.missed.square().sum(1) - left.square().sum(1)


def _counted(interactions: Interactions, stakes: Stakes, new: Tensor, num_pairs: int) -> PairTable:
    """Pairs of a window in which only the last MOST_EVENTS of each new item have happened."""
    by_item = History.of(interactions.items)
    kept = ~new[interactions.items] | (by_item.length - by_item.position <= MOST_EVENTS)
    events = interactions.select(kept)
    history, table = History.of(events.users), empty(interactions.num_items, num_pairs)
    for now in torch.split(torch.arange(len(events)), _BLOCK):
        learn(table, earlier(history, events.items, now, WINDOW), events.items[now], stakes)
    return table


def _latest_takers(interactions: Interactions) -> Takers:
    """The last MOST_EVENTS takers of each item [n], in the window as it was: a table of few items ticks too slowly."""
    again = History.of(interactions.users * interactions.num_items + interactions.items).position > 0
    items = interactions.items[~again]
    by_item, clock = History.of(items), torch.arange(len(items))
    last = by_item.length - by_item.position
    time = torch.zeros(interactions.num_items, dtype=torch.int64)
    time[items[last == 1]] = clock[last == 1]
    first = last == by_item.length.clamp(max=MOST_EVENTS)
    time[items[first]] -= clock[first]
    number = torch.bincount(items, minlength=interactions.num_items).clamp(max=MOST_EVENTS)
    return Takers(number, time)
