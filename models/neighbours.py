"""Pairs as the ranker reads them: by catalogue row, what counts add to the D dimensions.

One block of rows per partition, each as long as the catalogue and one row more; a block is written again where its
pairs have changed. Letters: N catalogue items, M pairs kept per item, P parts, C counted parts, R rows, U users.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from models.item_contexts import Takers, contexts, moves
from models.item_tables import LINE, ItemTables
from models.meta_parameters import MetaParameters
from models.pair_counts import PairTable, Stakes, empty, estimate, scale_of


class Moved(NamedTuple):
    """What is added to the out-vectors of new items: catalogue rows [m], vectors [m, D].

    m is filled up to whole cache lines by rows of N and zeros, so that products do not depend on the batch beside them.
    """

    rows: Tensor
    vectors: Tensor


class Blocks(NamedTuple):
    """Blocks of rows: neighbour items [rows, M] (N where none), values [rows, P, M]; by block, how new items moved."""

    items: Tensor
    values: Tensor
    moved: tuple[Moved | None, ...]


class Neighbours(NamedTuple):
    """Blocks, and each user's first row in them [U]."""

    blocks: Blocks
    first: Tensor

    def repeated(self, times: int) -> Neighbours:
        """The same for every user `times` in a row: [U * times]."""
        return self._replace(first=self.first.repeat_interleave(times))

    def move(self, plain: Tensor, vector: Tensor) -> Tensor:
        """Add to scores [U, W] of users' vectors [U, D] what new items have moved by, in place."""
        moved = self.blocks.moved
        if any(moved):
            length = len(self.blocks.items) // len(moved)
            block = self.first // length
            for place in torch.unique(block).tolist():
                if one := moved[place]:
                    told = torch.where((block == place)[:, None], vector @ one.vectors.T, 0.0)
                    plain.index_add_(1, one.rows, told)
        return plain


def stakes_of(parameters: MetaParameters) -> Stakes:
    """What weighs a version's pairs where they compete."""
    return Stakes(parameters.pair_worth, parameters.pseudo_events)


def initial_pairs(parameters: MetaParameters, number_of: Tensor, num_items: int) -> PairTable:
    """The pairs that a version brings, its items numbered by number_of [n] (-1 = nobody knows it yet)."""
    table = empty(num_items, parameters.neighbour_items.shape[1])
    known = number_of >= 0
    rows = number_of[known]
    none = torch.cat([number_of, number_of.new_full((1,), -1)])  # the last entry is what -1 reads
    others = none[parameters.neighbour_items[known]]
    table.others[rows] = others
    table.counts[rows] = torch.where(others[..., None] >= 0, parameters.pair_counts[known], 0.0)
    table.users[rows] = parameters.item_users[known]
    table.scale[rows] = torch.where(others >= 0, scale_of(table, rows[:, None], others.clamp(min=0)), 0.0)
    return table


class PairLayout:
    """Writes the rows of one partition's pairs into a block: `items` [N + 1, M] and `values` [N + 1, P, M]."""

    def __init__(self, tables: ItemTables) -> None:
        """Begin with what is predicted for the version's own pairs; a first `write` of all rows lays everything out."""
        self._tables = tables
        self._predicted, self._predicted_for = tables.predicted.clone(), tables.neighbour_items.clone()
        self._is_new = tables.trained_index < 0
        self._moves = dict[int, Tensor]()  # by catalogue row

    @property
    def moved(self) -> Moved | None:
        """What new items have moved by, as of the last `write`."""
        if not self._moves:
            return None
        rows, vectors = (
            torch.tensor(sorted(self._moves)),
            torch.stack([self._moves[row] for row in sorted(self._moves)]),
        )
        missing, device = -len(rows) % LINE, self._tables.vectors.device
        rows = functional.pad(rows, (0, missing), value=self._tables.num_items)
        return Moved(rows.to(device), functional.pad(vectors, (0, 0, 0, missing)).to(device))

    def write(
        self, block: tuple[Tensor, Tensor], pairs: PairTable, rows: Tensor, numbering: tuple[Tensor, Tensor]
    ) -> None:
        """Write catalogue rows [R] of a block, in place.

        `numbering`: numbers [N] and rows [n], which item of `pairs` a row is and back. What is predicted for a pair is
        looked up once: rows must be written whenever their pairs have changed, into whatever block.
        """
        (items, values), (numbers, row_of) = block, numbering
        at, num_items = numbers[rows].cpu(), self._tables.num_items
        others, device = pairs.others[at], items.device
        listed = row_of[others.clamp(min=0)]
        found = torch.where((others >= 0) & (listed >= 0), listed, num_items).to(device)
        self._predict(rows, found)
        columns = (pairs.counts[at], pairs.scale[at], pairs.entered[at])
        counts, scale, entered = (column.to(device) for column in columns)
        counted = estimate(counts, scale, entered, self._predicted[rows], self._tables.pseudo_events)
        brought = torch.where(entered[..., None] == 0, self._tables.uncounted[rows], 0.0)
        told = torch.cat([counted, brought], 2).masked_fill((found == num_items)[..., None], 0.0)
        items[rows], values[rows] = found, told.transpose(1, 2)
        self._move(rows, found, counts[..., 0], Takers.of(pairs, at))

    def _move(self, rows: Tensor, found: Tensor, counts: Tensor, takers: Takers) -> None:
        """Note how far new items among these rows are now from what their texts say."""
        tables = self._tables
        new = (self._is_new[rows].cpu() & (found < tables.num_items).any(1).cpu()).nonzero()[:, 0]
        if not len(tables.motion.company) or not len(new):
            return
        others = torch.where(found[new] < tables.num_items, found[new], -1)
        company = contexts(others, counts[new], tables.vectors)
        changes = moves(company, Takers(*(column[new].to(company.device) for column in takers)), tables.motion)
        self._moves.update(zip(rows[new].tolist(), changes.cpu(), strict=True))

    def _predict(self, rows: Tensor, items: Tensor) -> None:
        """Note what the dimensions predict for the pairs that have changed."""
        news = (items != self._predicted_for[rows]) & (items < self._tables.num_items)
        place, slot = news.nonzero(as_tuple=True)
        self._predicted[rows[place], slot] = self._tables.predict(rows[place], items[place, slot])
        self._predicted_for[rows] = items
