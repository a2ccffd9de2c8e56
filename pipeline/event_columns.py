"""What happened to the applied events of a micro-batch, as columns: what they read, and what was predicted of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.known import Before
from pipeline.served_items import Applied, ItemSide
from pipeline.support import Ints
from pipeline.task_batches import Reading


@dataclass(slots=True)
class EventColumns:
    """Events in (partition, offset) order; what they read, their losses [2, E] and ranks [3, E] are filled in later."""

    slots: Ints
    partition: Ints
    offset: Ints
    record_ms: Ints
    ids: Ints
    bodies: Ints
    types: Ints
    items: Ints
    positive: NDArray[np.bool_]
    num_events: Ints
    before: Before = field(init=False)
    side: ItemSide = field(init=False)
    losses: NDArray[np.float32] = field(init=False)
    ranks: Ints = field(init=False)

    def __post_init__(self) -> None:
        num = len(self.slots)
        self.losses, self.ranks = np.zeros((2, num), np.float32), np.zeros((3, num), np.int64)

    def applied(self) -> Applied:
        """What the item side has to know of them."""
        return Applied(self.partition, self.offset, self.num_events, self.items, self.positive, self.before)

    @property
    def reading(self) -> Reading:
        """What each event reads."""
        return Reading(self.num_events, self.side.prior_rows, self.side.pair_rows)
