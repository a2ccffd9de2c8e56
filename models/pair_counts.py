"""Item-item counts that move online: every item's strongest pairs, counted as events come, in bounded memory.

A version brings each item's M strongest pairs and their counts; later positives of a partition are counted on top.
An item's pair is served as the shrinkage between what the version predicts (vectors learnt, or read from a text) and
what was counted: `(count + s * prediction) / (q + s)`, q = `similarity_scale` the precision, s pseudo-events. A pair
that enters later is counted from then on only, so its precision is what q has grown by since.
Everything is counted in whole numbers: the cutting of events cannot show, nor their order but in when takers came.

Letters: E events, W newest positives looked at, n items (numbered by the caller), M pairs kept per item, C counted
parts (`item_fitting.PARTS[:COUNTED]`), R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.item_fitting import COUNTED, HORIZONS, similarity_factors

# Offsets of a partition between two moments at which counts take effect, a multiple of popularity's. Sooner is worse:
# a user's own burst would be in the pairs that she is served by, which her support has told already (LOG.md, "A: behind
# ItemKNN").
PAIR_EPOCH = 1024
WINDOW = max(HORIZONS)  # newest positives that an item is paired with, online
_GRID = 2**21  # cells of a grid that finds pairs: 4 MB
_LEAST_SCALE = 1e-6  # 0 marks pairs that the version brought


@dataclass(slots=True)
class PairTable:
    """The strongest pairs of n items.

    Attributes:
        others: [n, M] int64 the other item, -1 where there is none.
        counts: [n, M, C] float32 how often each part counted the pair since it entered.
        scale: [n, M] float32 q when the row last changed.
        entered: [n, M] float32 q when the pair entered; 0 for pairs that the version brought.
        users: [n] float32 users who took the item.
        arrived, latest: [n] int64 when the first and the latest of those counted here took it, 0 where nobody has: a
            clock that ticks with every taker of any item, which knows neither time of day nor what else the log holds.

    """

    others: Tensor
    counts: Tensor
    scale: Tensor
    entered: Tensor
    users: Tensor
    arrived: Tensor
    latest: Tensor

    @property
    def num_items(self) -> int:
        """Give n."""
        return len(self.users)

    def grown(self, num_items: int) -> PairTable:
        """The same with room for more items."""
        more = num_items - self.num_items
        if more <= 0:
            return self
        none = self.others.new_full((more, self.others.shape[1]), -1)
        rest = (torch.cat([old, old.new_zeros(more, *old.shape[1:])]) for old in
                (self.counts, self.scale, self.entered, self.users, self.arrived, self.latest))  # fmt: skip
        return PairTable(torch.cat([self.others, none]), *rest)


class Stakes(NamedTuple):
    """What a unit of each counted part is worth where pairs compete, and its pseudo-events: [C] each."""

    worth: Tensor
    pseudo_events: Tensor


class Found(NamedTuple):
    """Pairs seen in a stretch of events: row and other item [R], what each part counts [R, C]."""

    rows: Tensor
    others: Tensor
    counts: Tensor


def empty(num_items: int, num_pairs: int) -> PairTable:
    """A table that knows nothing."""
    others = torch.full((num_items, num_pairs), -1)
    cells = torch.zeros(num_items, num_pairs)
    users, never = torch.zeros(num_items), torch.zeros(num_items, dtype=torch.int64)
    counts = torch.zeros(num_items, num_pairs, COUNTED)
    return PairTable(others, counts, cells, cells.clone(), users, never, never.clone())


def learn(table: PairTable, before: Tensor, items: Tensor, stakes: Stakes) -> Tensor:
    """Count events in place: items [E] and the W newest positives before each [E, W] (-1 = none, newest last).

    `stakes` weigh the parts where pairs compete for the slots of an item. Gives the rows that changed, ascending.
    """
    first = (before != items[:, None]).all(1)  # repeats are no new user of the item
    _take(table, items[first])
    found = pairs(before, items, table.num_items)
    changed: Tensor
    changed, place = torch.unique_consecutive(found.rows, return_inverse=True)
    others = table.others[changed]
    table.scale[changed] = torch.where(others >= 0, scale_of(table, changed[:, None], others.clamp(min=0)), 0.0)
    slots = _slots(others, place, found.others, table.num_items)
    known = slots >= 0
    table.counts[found.rows[known], slots[known]] += found.counts[known]
    _enter(table, changed, (place[~known], Found(*(column[~known] for column in found))), stakes)
    rows: Tensor = torch.unique(torch.cat([changed, items[first]]))  # a user's first item has no pair, but a user more
    return rows


def _take(table: PairTable, items: Tensor) -> None:
    """Count a taker of each of the items [E], in their order, in place."""
    table.users.index_add_(0, items, torch.ones(len(items)))
    if len(items):
        now = table.latest.max() + torch.arange(1, len(items) + 1)
        table.latest.scatter_reduce_(0, items, now, "amax")
        begun = torch.zeros_like(table.arrived).scatter_reduce_(0, items, now, "amin", include_self=False)
        table.arrived = torch.where(table.arrived > 0, table.arrived, begun)


def pairs(before: Tensor, items: Tensor, num_items: int) -> Found:
    """What the events [E] count, by row and then other item: both ways of the cosine, and by horizon who came after.

    The cosine counts users who had both: only an item that is new in its window, with each other one once.
    """
    age = torch.arange(before.shape[1], 0, -1)
    again = before == items[:, None]
    event, slot = ((before >= 0) & ~again).nonzero(as_tuple=True)
    had, item = before[event, slot], items[event]
    once = (~(_repeated(before)[event, slot] | again.any(1)[event])).long()
    # a bit for each part behind the pair's number, so that one sort of whole numbers brings equal pairs together
    ahead = once.clone()
    for part, horizon in enumerate(HORIZONS[1:], 1):
        ahead += (age <= horizon).long()[slot] << part
    both_ways = once.nonzero()[:, 0]
    back = (item * num_items + had)[both_ways]
    packed = torch.cat([(had * num_items + item << COUNTED) + ahead, (back << COUNTED) + 1]).sort().values
    keys, number = torch.unique_consecutive(packed >> COUNTED, return_inverse=True)
    bits = (packed[:, None] >> torch.arange(COUNTED)) & 1
    counts = torch.zeros(len(keys), COUNTED).index_add_(0, number, bits.float())
    return Found(keys // num_items, keys % num_items, counts)


def estimate(counts: Tensor, scale: Tensor, entered: Tensor, predicted: Tensor, pseudo_events: Tensor) -> Tensor:
    """What counts [..., C] say beyond the prediction [..., C], shrunk to nothing where little was seen: [..., C]."""
    seen = scale - entered
    return (counts - seen[..., None] * predicted) / (scale[..., None] + pseudo_events)


def _repeated(before: Tensor) -> Tensor:
    """Which slots [E, W] hold an item that comes again in a newer slot."""
    order = torch.argsort(before, dim=1, stable=True)
    ordered = before.gather(1, order)
    again = torch.nn.functional.pad(ordered[:, :-1] == ordered[:, 1:], (0, 1))
    return torch.zeros_like(again).scatter_(1, order, again)


def _slots(others: Tensor, place: Tensor, wanted: Tensor, num_items: int) -> Tensor:
    """Where rows of others [R, M] hold wanted items [F], -1 where they do not; place [F] names the rows, ascending."""
    found = torch.empty_like(place)
    step = max(1, _GRID // (num_items + 1))
    for first in range(0, len(others), step):
        rows = others[first : first + step]
        # a column for every item and one for empty slots; looking up is a hundred times faster than comparing
        grid = torch.full((len(rows), num_items + 1), -1, dtype=torch.int16)
        numbers = torch.arange(rows.shape[1], dtype=torch.int16)
        grid.scatter_(1, torch.where(rows >= 0, rows, num_items), numbers.expand_as(rows))
        begin, end = torch.searchsorted(place, torch.tensor([first, first + step])).tolist()
        found[begin:end] = grid[place[begin:end] - first, wanted[begin:end]].long()
    return found


def scale_of(table: PairTable, had: Tensor, scored: Tensor) -> Tensor:
    """Give q of pairs of items, any shapes that broadcast."""
    one, other = similarity_factors(table.users)
    return one[had] * other[scored]


def _strength(counts: Tensor, scale: Tensor, stakes: Stakes) -> Tensor:
    """What a pair is worth [...], from its counts [..., C] and scale [...]."""
    total: Tensor = torch.zeros_like(scale)
    for part in range(COUNTED):
        total += counts[..., part] * stakes.worth[part] / (scale + stakes.pseudo_events[part])
    return total


def _enter(table: PairTable, changed: Tensor, candidates: tuple[Tensor, Found], stakes: Stakes) -> None:
    """Let new pairs take the places of weaker ones, in place: a row's strongest goes against its weakest, and so on.

    candidates: the pairs [F], and the place of each one's row in `changed`.
    """
    place, new = candidates
    held = _strength(table.counts[changed], table.scale[changed], stakes)
    held = held.masked_fill(table.others[changed] < 0, -torch.inf)
    scale = scale_of(table, new.rows, new.others)
    strength = _strength(new.counts, scale, stakes)
    order = (strength > held.amin(1)[place]).nonzero()[:, 0]  # the others cannot enter: few are left to be sorted
    order = order[torch.argsort(strength[order], descending=True, stable=True)]
    order = order[torch.argsort(place[order], stable=True)]
    rank = torch.arange(len(order)) - torch.searchsorted(place[order], place[order])
    order, rank = order[rank < held.shape[1]], rank[rank < held.shape[1]]
    touched, row = torch.unique_consecutive(place[order], return_inverse=True)
    slot = torch.argsort(held[touched], dim=1, stable=True)[row, rank]
    wins = strength[order] > held[place[order], slot]
    order, slot = order[wins], slot[wins]
    rows = new.rows[order]
    table.others[rows, slot] = new.others[order]
    table.counts[rows, slot] = new.counts[order]
    table.scale[rows, slot] = scale[order]
    table.entered[rows, slot] = scale[order].clamp(min=_LEAST_SCALE)
