"""The pairs of the partitions that a worker holds, laid out by catalogue row for one version and one snapshot.

Blocks of rows stand in one table, so that a chunk may hold users of several partitions and epochs: the newest block of
each partition, and those of earlier epochs that this micro-batch still reads.
Letters: N catalogue items, P parts, M pairs kept per item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.item_tables import ItemTables
from models.neighbours import Blocks, Moved, PairLayout
from pipeline.item_statistics import OnlinePairs
from pipeline.support import Ints


@dataclass(slots=True)
class _Held:
    """A partition's pairs, what is known of their rows, and where their newest block stands."""

    pairs: OnlinePairs
    layout: PairLayout
    place: int


class ServedPairs:
    """Blocks by partition; `row_of` gives the catalogue rows of item numbers as they are known now."""

    def __init__(self, tables: ItemTables, item_nos: Ints, row_of: Callable[[], Ints]) -> None:
        """Hold no partition yet."""
        self._catalogue, self._row_of = tables, row_of
        self._numbers = torch.from_numpy(item_nos)
        self._held: dict[int, _Held] = {}
        self._read = set[int]()
        # [blocks, N + 1, M] and [blocks, N + 1, P, M]
        self._items, self._values = tables.neighbour_items[None][:0], tables.neighbour_values[None][:0]
        self._moved: list[Moved | None] = []

    @property
    def tables(self) -> Blocks:
        """All blocks, one after the other."""
        return Blocks(self._items.flatten(0, 1), self._values.flatten(0, 1), tuple(self._moved))

    def forget(self, partition: int) -> None:
        """Drop a partition's block; its place is used again."""
        self._held.pop(partition, None)

    def begin_batch(self) -> None:
        """Nothing reads blocks of earlier epochs any more."""
        self._read.clear()

    def first_row(self, partition: int, pairs: OnlinePairs) -> int:
        """Where a partition's pairs stand as they are now, until the next batch begins."""
        if not len(self._numbers):
            return 0
        changed, held = pairs.take_changed(), self._held.get(partition)
        if held is None or held.pairs is not pairs:  # another version in between has begun anew
            held = self._held[partition] = _Held(pairs, PairLayout(self._catalogue), self._free())
            self._write(held, torch.arange(self._catalogue.num_items))
        elif len(changed):
            if held.place in self._read:
                held.place = self._copied(held.place)
            rows = torch.from_numpy(self._row_of())[changed]
            self._write(held, rows[rows >= 0])
        self._read.add(held.place)
        return held.place * self._items.shape[1]

    def _write(self, held: _Held, rows: Tensor) -> None:
        row_of = torch.from_numpy(self._row_of())
        pairs, block = held.pairs.table.grown(len(row_of)), (self._items[held.place], self._values[held.place])
        held.layout.write(block, pairs, rows, (self._numbers, row_of))
        self._moved[held.place] = held.layout.moved

    def _copied(self, place: int) -> int:
        copy = self._free()
        self._items[copy], self._values[copy] = self._items[place], self._values[place]
        return copy

    def _free(self) -> int:
        """A place that nobody reads, its pairs whatever they were."""
        used = self._read | {held.place for held in self._held.values()}
        place = next((place for place in range(len(self._items)) if place not in used), len(self._items))
        if place == len(self._items):
            self._items = torch.cat([self._items, self._catalogue.neighbour_items[None]])
            self._values = torch.cat([self._values, self._catalogue.neighbour_values[None]])
            self._moved.append(None)
        return place
