"""Users' memory as the ranker takes it: chunks of users laid out as tensors.

Letters: U users of a chunk, S support slots, N catalogue items.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.neighbours import Blocks, Neighbours
from models.ranker import Ranker, TaskBatch
from pipeline.catalogue import Catalogue
from pipeline.known import Known
from pipeline.support import Ints, UserTable

# Users per call of the ranker. Padding to one of few sizes keeps a row's result independent of the others, to the bit:
# matrix kernels give the same rows at any of these sizes, but not below 16, where they divide long sums in other ways.
CHUNK_SIZES = range(16, 257, 16)
_CACHED_SCORES = 2**19  # of a call's users over the catalogue: 2 MiB, a core's second-level cache
_LEAST_LARGEST = 128  # below, what every call costs anew is more than what the cache saves


def largest_chunk(num_items: int) -> int:
    """Most users per call of the ranker: as many as have their scores in the cache, within bounds."""
    return min(max(_CACHED_SCORES // max(num_items, 1) // 16 * 16, _LEAST_LARGEST), CHUNK_SIZES[-1])


class Reading(NamedTuple):
    """What each of U events reads: K, its row of the priors, the first row of its block of pairs. [U] each."""

    num_events: Ints
    prior_rows: Ints
    pair_rows: Ints

    def of(self, rows: Ints) -> Reading:
        """Those of some of the events."""
        return Reading(*(column[rows] for column in self))


class TaskBatches:
    """Lays out users under one version and one catalogue snapshot."""

    def __init__(
        self,
        table: UserTable,
        ranker: Ranker,
        catalogue: Catalogue,
        *,
        type_weights: NDArray[np.float32],
        recommend_seen: bool,
    ) -> None:
        """type_weights: of positives, by the code of the event's type; recommend_seen: whether items may come again."""
        self._table, self._ranker, self._catalogue = table, ranker, catalogue
        self._type_weights, self._recommend_seen = type_weights, recommend_seen
        self._device = ranker.items.vectors.device
        self._withdrawn = torch.from_numpy(catalogue.unavailable).to(self._device)

    def chunks(self, indices: Ints) -> Iterator[Ints]:
        """Stretches of as many as one call of the ranker takes."""
        largest = largest_chunk(len(self._catalogue.item_nos))
        for first in range(0, len(indices), largest):
            yield indices[first : first + largest]

    def of(self, slots: Ints, known: Known, reading: Reading, pairs: Blocks | None) -> TaskBatch:
        """The tasks of a chunk of users, padded; pairs: `ServedPairs.tables`, None for those of the version."""
        table, size = self._table, self._ranker.parameters.support_size
        columns = {
            "support": padded(self._catalogue.row_of[known.support_items[:, -size:]], -1),
            "weights": padded(self._type_weights[known.support_types[:, -size:]], 0),
            "num_events": padded(reading.num_events, 0),
            "state": padded(table.adapter[slots, : self._ranker.state_size], 0),
            "state_events": padded(table.adapter_events[slots], 0),
            "track": padded(table.track[slots, : self._ranker.track_size], 0),
            "prior_rows": padded(reading.prior_rows, 0),
        }
        moved = {name: column.to(self._device) for name, column in columns.items()}
        excluded = self._excluded(known, len(columns["support"]))
        first = padded(reading.pair_rows, 0).to(self._device)
        return TaskBatch(**moved, excluded=excluded, neighbours=Neighbours(pairs, first) if pairs else None)

    def _excluded(self, known: Known, size: int) -> Tensor:
        """Dismissed, withdrawn and (unless repeated) seen items at -inf, the others at 0 [size, N]."""
        num_items = len(self._catalogue.item_nos)
        rows = self._catalogue.row_of[np.abs(known.marks)]
        if self._recommend_seen:
            rows[known.marks > 0] = -1
        # one column more in front, for items without a row (-1)
        excluded = torch.zeros(size, 1 + num_items, device=self._device)
        rows += np.repeat(np.arange(len(known.num_marks)) * (1 + num_items) + 1, known.num_marks)
        excluded.view(-1).index_fill_(0, torch.from_numpy(rows).to(self._device), -torch.inf)
        excluded[:, 1:].index_fill_(1, self._withdrawn, -torch.inf)
        return excluded[:, 1:]


def padded(rows: NDArray[np.generic], value: int) -> Tensor:
    """Rows [n, …] padded to the next of CHUNK_SIZES."""
    size = next(size for size in CHUNK_SIZES if size >= len(rows))
    if size == len(rows):
        return torch.from_numpy(np.ascontiguousarray(rows))
    filled = np.full((size, *rows.shape[1:]), value, rows.dtype)
    filled[: len(rows)] = rows
    return torch.from_numpy(filled)
