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


class NeighbourBlock:
    """The rows of one partition: `items` [N + 1, M] and `values` [N + 1, P, M], views into a larger table or not."""

    def __init__(self, tables: ItemTables, items: Tensor, values: Tensor) -> None:
        """Take the rows as they are; they hold nothing before the first `refresh` of all."""
        self._tables, self.items, self.values = tables, items, values
        self._predicted = values.new_zeros(*items.shape, tables.pair_means.shape[1])
        self._predicted_for = torch.full_like(items, -1)

    def refresh(self, pairs: PairTable, rows: Tensor, numbers: Tensor, row_of: Tensor) -> None:
        """Write catalogue rows [R] again; numbers [N] and row_of [n] say which item of `pairs` a row is, and back."""
        at, num_items = numbers[rows].cpu(), self._tables.num_items
        others, device = pairs.others[at], self.items.device
        listed = row_of[others.clamp(min=0)]
        items = torch.where((others >= 0) & (listed >= 0), listed, num_items).to(device)
        self._predict(rows, items)
        columns = (pairs.counts[at], pairs.scale[at], pairs.entered[at])
        counts, scale, entered = (column.to(device) for column in columns)
        counted = estimate(counts, scale, entered, self._predicted[rows], self._tables.pseudo_events)
        brought = torch.where(entered[..., None] == 0, self._tables.uncounted[rows], 0.0)
        values = torch.cat([counted, brought], 2).masked_fill((items == num_items)[..., None], 0.0)
        self.items[rows], self.values[rows] = items, values.transpose(1, 2)

    def _predict(self, rows: Tensor, items: Tensor) -> None:
        """Note what the dimensions predict for the pairs that have changed."""
        tables, counted = self._tables, self._predicted.shape[2]
        place, slot = ((items != self._predicted_for[rows]) & (items < tables.num_items)).nonzero(as_tuple=True)
        had, other = rows[place], items[place, slot]
        inside, out = tables.item_in[had, :counted], tables.vectors[other, None, : tables.item_in.shape[2]]
        self._predicted[had, slot] = tables.pair_means[had] + (inside * out).sum(2)
        self._predicted_for[rows] = items
