"""What a micro-batch changes: lists, prequential record, segments; the rows of one transaction.

Letters: E events, U users, k list slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.batching import MicroBatch
from pipeline.item_statistics import ItemStatistics, PairEvents
from pipeline.support import Ints, Segments


@dataclass(slots=True)
class Prequential:
    """What was predicted before each positive [E], in (partition, offset) order, and what else was applied.

    Attributes:
        event_ms: the events' own time; record_ms is Kafka's.
        new_items: whether the version never saw the item.
        scenes: what the events say of where they happened, None where nothing.
        applied_types: events applied of each partition, by type code.

    """

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
    event_ms: Ints
    new_items: NDArray[np.bool_]
    scenes: list[str | None]
    applied_types: dict[int, Ints]


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
    pair_events: list[PairEvents]
    version: int
    state_size: int
    track_size: int
