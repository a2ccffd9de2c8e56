"""The catalogue as a worker sees it: text ids and item numbers outside, rows of tensors inside.

An item number is Postgres' short name for an id and never changes; a row is a place in one snapshot's tensors, in the
bytes order of the ids, so that ties between scores are broken as `COLLATE "C"` would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models.item_tables import ItemTables, assemble_items
from models.meta_parameters import MetaParameters
from pipeline.support import Ints


@dataclass(frozen=True, slots=True)
class ListedItem:
    """One row of `innerloop.items`; `known` is False for an item that only interactions have named."""

    item_id: str
    item_no: int
    text: str
    available: bool
    known: bool


@dataclass(slots=True)
class Catalogue:
    """One snapshot: N known items in rows, and the numbers of all items, unknown ones included.

    Attributes:
        item_nos: [N] item number of each row.
        row_of: [largest number + 1] row of each item number, -1 for 0 and for unknown items.
        unavailable: rows that may not be listed.

    """

    snapshot: int
    number_of: dict[str, int]
    item_nos: Ints
    row_of: Ints
    unavailable: Ints
    tables: ItemTables

    def number(self, item_nos: Mapping[str, int]) -> None:
        """Learn the numbers of items that the catalogue does not know: they get no row."""
        self.number_of.update(item_nos)
        missing = max(item_nos.values(), default=0) + 1 - len(self.row_of)
        if missing > 0:
            self.row_of = np.concatenate([self.row_of, np.full(missing, -1, np.int64)])


def build_catalogue(
    snapshot: int, items: Sequence[ListedItem], embeddings: Tensor, parameters: MetaParameters
) -> Catalogue:
    """Lay out all `items` of a snapshot for one meta version.

    `embeddings` [N, T] are those of the known items, in the order of `listed_rows(items)`.
    """
    rows = listed_rows(items)
    row_of = np.full(max((item.item_no for item in items), default=0) + 1, -1, np.int64)
    item_nos = np.array([item.item_no for item in rows], np.int64)
    row_of[item_nos] = np.arange(len(rows))
    trained_index = parameters.rows_of([item.item_id for item in rows])
    return Catalogue(
        snapshot=snapshot,
        number_of={item.item_id: item.item_no for item in items},
        item_nos=item_nos,
        row_of=row_of,
        unavailable=np.flatnonzero([not item.available for item in rows]),
        tables=assemble_items(parameters, embeddings, trained_index.to(embeddings.device)),
    )


def listed_rows(items: Sequence[ListedItem]) -> list[ListedItem]:
    """The known items in row order."""
    return sorted((item for item in items if item.known), key=lambda item: item.item_id.encode())
