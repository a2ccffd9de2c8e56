"""The pairs of the partitions that a worker holds, laid out by catalogue row for one version and one snapshot.

A partition's block stands in one table with the others', so that a chunk may hold users of several partitions.
Letters: N catalogue items, B blocks, U users.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.item_tables import ItemTables
from models.neighbours import NeighbourBlock, Neighbours
from models.pair_counts import PairTable
from pipeline.support import Ints


class ServedPairs:
    """Blocks by partition; `row_of` gives the catalogue rows of item numbers as they are known now."""

    def __init__(self, tables: ItemTables, item_nos: Ints, row_of: Callable[[], Ints]) -> None:
        """Hold no partition yet."""
        self._tables, self._row_of = tables, row_of
        self._numbers = torch.from_numpy(item_nos)
        self._place: dict[int, int] = {}
        self._blocks: list[NeighbourBlock] = []
        self._items, self._values = tables.neighbour_items[:0], tables.neighbour_values[:0]

    def holds(self, partition: int) -> bool:
        """Whether a partition has a block."""
        return partition in self._place

    def forget(self, partition: int) -> None:
        """Drop a partition's block; its place is used again."""
        self._place.pop(partition, None)

    def refresh(self, partition: int, pairs: PairTable, changed: Tensor | None) -> None:
        """Write the rows of changed item numbers again; all of them for a partition that has no block yet."""
        if not len(self._numbers):
            return
        row_of = torch.from_numpy(self._row_of())
        if not self.holds(partition):
            self._place[partition], changed = self._free(), None
        rows = torch.arange(self._tables.num_items) if changed is None else row_of[changed]
        pairs = pairs.grown(len(row_of))
        self._blocks[self._place[partition]].refresh(pairs, rows[rows >= 0], self._numbers, row_of)

    def of(self, partitions: NDArray[np.int32]) -> Neighbours | None:
        """Give users of these partitions [U] their pairs; None where nothing is held."""
        if not (len(partitions) and self._blocks):
            return None
        rows = self._tables.num_items + 1
        first = np.fromiter((self._place[partition] * rows for partition in partitions.tolist()), np.int64)
        return Neighbours(self._items, self._values, torch.from_numpy(first).to(self._items.device))

    def _free(self) -> int:
        used = set(self._place.values())
        place = next((place for place in range(len(self._blocks)) if place not in used), len(self._blocks))
        if place == len(self._blocks):
            tables = self._tables
            self._items = torch.cat([self._items, tables.neighbour_items])
            self._values = torch.cat([self._values, tables.neighbour_values])
            self._blocks.append(NeighbourBlock(tables, tables.neighbour_items, tables.neighbour_values))
            blocks = zip(self._blocks, self._items.chunk(place + 1), self._values.chunk(place + 1), strict=True)
            for block, items, values in blocks:
                block.items, block.values = items, values
        return place
