"""Pairs as the ranker reads them: by catalogue row, what counts add to the D dimensions.

One block of rows per partition, each as long as the catalogue and one row more; a block is written again where its
pairs have changed. Letters: N catalogue items, M pairs kept per item, P parts, C counted parts, R rows, U users.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.item_tables import ItemTables
from models.meta_parameters import MetaParameters
from models.pair_counts import PairTable, Stakes, empty, estimate, scale_of


class Neighbours(NamedTuple):
    """Blocks of rows: neighbour items [rows, M] (N where none), values [rows, P, M], each user's first row [U]."""

    items: Tensor
    values: Tensor
    first: Tensor


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
        """Begin with no pair known; a first `write` of all rows lays everything out."""
        self._tables = tables
        self._predicted = tables.vectors.new_zeros(*tables.neighbour_items.shape, tables.pair_means.shape[1])
        self._predicted_for = torch.full_like(tables.neighbour_items, -1)

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

    def _predict(self, rows: Tensor, items: Tensor) -> None:
        """Note what the dimensions predict for the pairs that have changed."""
        tables, counted = self._tables, self._predicted.shape[2]
        place, slot = ((items != self._predicted_for[rows]) & (items < tables.num_items)).nonzero(as_tuple=True)
        had, other = rows[place], items[place, slot]
        inside, out = tables.item_in[had, :counted], tables.vectors[other, None, : tables.item_in.shape[2]]
        self._predicted[had, slot] = tables.pair_means[had] + (inside * out).sum(2)
        self._predicted_for[rows] = items
