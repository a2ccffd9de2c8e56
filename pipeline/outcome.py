"""What a micro-batch changes: lists, prequential record, segments; the rows of one transaction.

Letters: E events, U users, k list slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.batching import MicroBatch
from pipeline.item_statistics import ItemStatistics
from pipeline.support import Ints, Segments


@dataclass(slots=True)
class Prequential:
    """What was predicted before each positive [E], in (partition, offset) order."""

    partition: Ints
    offset: Ints
    record_ms: Ints
    user_ids: list[str]
    item_nos: Ints
    types: Ints
    num_events: Ints
    loss_adapted: NDArray[np.float32]
    loss_start: NDArray[np.float32]
    rank_adapted: Ints
    rank_start: Ints
    rank_popular: Ints


@dataclass(slots=True)
class Lists:
    """The lists of U users (or partitions): item numbers and scores [U, k], how many count [U]."""

    item_nos: Ints
    scores: NDArray[np.float64]
    lengths: Ints


@dataclass(slots=True)
class Outcome:
    """Everything that one micro-batch changes; written in one transaction."""

    batch: MicroBatch
    slots: Ints
    lists: Lists
    prequential: Prequential
    id_segments: Segments
    seen_segments: Segments
    statistics: dict[int, ItemStatistics]
    popular: dict[int, Lists]
    version: int
