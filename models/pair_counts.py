"""Item-item counts that move online: every item's strongest pairs, counted as events come, in bounded memory.

A version brings each item's M strongest pairs and their counts; later positives of a partition are counted on top.
An item's pair is served as the shrinkage between what the version predicts (vectors learnt, or read from a text) and
what was counted: `(count + s * prediction) / (q + s)`, q = `similarity_scale` the precision, s pseudo-events. A pair
that enters later is counted from then on only, so its precision is what q has grown by since.
Everything is counted in whole numbers: neither the order nor the cutting of events can show.

Letters: E events, W newest positives looked at, n items (numbered by the caller), M pairs kept per item, C counted
parts (`item_fitting.PARTS[:COUNTED]`), R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.item_fitting import COUNTED, HORIZONS, similarity_scale

WINDOW = max(HORIZONS)  # newest positives that an item is paired with, online
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

    """

    others: Tensor
    counts: Tensor
    scale: Tensor
    entered: Tensor
    users: Tensor

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
                (self.counts, self.scale, self.entered, self.users))  # fmt: skip
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
    return PairTable(others, torch.zeros(num_items, num_pairs, COUNTED), cells, cells.clone(), torch.zeros(num_items))


def learn(table: PairTable, before: Tensor, items: Tensor, stakes: Stakes) -> Tensor:
    """Count events in place: items [E] and the W newest positives before each [E, W] (-1 = none, newest last).

    `stakes` weigh the parts where pairs compete for the slots of an item. Gives the rows that changed, ascending.
    """
    first = (before != items[:, None]).all(1)  # repeats are no new user of the item
    table.users.index_add_(0, items[first], torch.ones(int(first.sum())))
    found = pairs(before, items, table.num_items)
    changed: Tensor = torch.unique(found.rows)
    newest = scale_of(table, changed[:, None], table.others[changed].clamp(min=0))
    table.scale[changed] = torch.where(table.others[changed] >= 0, newest, 0.0)
    held = table.others.int().index_select(0, found.rows) == found.others.int()[:, None]
    place = held.view(torch.uint8).argmax(1)
    known = held.gather(1, place[:, None])[:, 0]
    table.counts[found.rows[known], place[known]] += found.counts[known]
    _enter(table, Found(*(column[~known] for column in found)), stakes)
    return changed


def pairs(before: Tensor, items: Tensor, num_items: int) -> Found:
    """What the events [E] count: both directions of the cosine, and who came after whom, by the parts' horizons.

    The cosine counts users who had both: only an item that is new in its window, with each other one once.
    """
    age = torch.arange(before.shape[1], 0, -1)
    present = (before >= 0) & (before != items[:, None])
    event, slot = present.nonzero(as_tuple=True)
    had, item = before[event, slot], items[event]
    repeated = _repeated(before)[event, slot] | (before == items[:, None]).any(1)[event]
    directed = [(age <= horizon)[slot].float() for horizon in HORIZONS[1:]]
    once = (~repeated).float()
    nothing = torch.zeros_like(once)
    ahead = torch.stack([once, *directed], 1)
    back = torch.stack([once, *(nothing for _ in directed)], 1)
    keys, number = torch.unique(torch.cat([had * num_items + item, item * num_items + had]), return_inverse=True)
    counts = torch.zeros(len(keys), COUNTED).index_add_(0, number, torch.cat([ahead, back]))
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


def scale_of(table: PairTable, had: Tensor, scored: Tensor) -> Tensor:
    """Give q of pairs of items, any shape."""
    return similarity_scale(table.users[had], table.users[scored])


def _strength(counts: Tensor, scale: Tensor, stakes: Stakes) -> Tensor:
    strength: Tensor = (counts / (scale[..., None] + stakes.pseudo_events)) @ stakes.worth
    return strength


def _enter(table: PairTable, new: Found, stakes: Stakes) -> None:
    """Let a row's strongest new pairs take the places of its weakest ones, in place."""
    scale = scale_of(table, new.rows, new.others)
    strength = _strength(new.counts, scale, stakes)
    touched, number = torch.unique_consecutive(new.rows, return_inverse=True)
    held = _strength(table.counts[touched], table.scale[touched], stakes)
    held = held.masked_fill(table.others[touched] < 0, -torch.inf)
    hopeful = (strength > held.amin(1)[number]).nonzero()[:, 0]  # few, once a row is full: sorting is what costs
    order = hopeful[torch.argsort(strength[hopeful], descending=True, stable=True)]
    order = order[torch.argsort(new.rows[order], stable=True)]
    rows = new.rows[order]
    place = torch.arange(len(rows)) - torch.searchsorted(rows, rows)  # among the row's new pairs, strongest first
    order, place = order[place < held.shape[1]], place[place < held.shape[1]]
    contested, number = torch.unique_consecutive(number[order], return_inverse=True)
    weakest = torch.argsort(held[contested], dim=1, stable=True)
    slot = weakest[number, place]
    wins = strength[order] > held[contested[number], slot]
    order, slot = order[wins], slot[wins]
    rows = new.rows[order]
    table.others[rows, slot] = new.others[order]
    table.counts[rows, slot] = new.counts[order]
    table.scale[rows, slot] = scale[order]
    table.entered[rows, slot] = scale[order].clamp(min=_LEAST_SCALE)
