"""What moves online on the item side: position popularity, owned by a partition, taking effect at fixed offsets.

Counts change with every positive, but predictions read the counts as of the last multiple of `EPOCH` offsets. Cutting
the log into other batches therefore cannot change a score, and delays of this length cost no quality.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.popularity import NUM_BUCKETS, advance
from pipeline.support import Ints

__all__ = ["EPOCH", "NUM_BUCKETS", "ItemStatistics"]

EPOCH = 1024  # offsets between two moments at which counts take effect


@dataclass(slots=True)
class ItemStatistics:
    """Position-popularity counts of one partition.

    Attributes:
        epoch_offset: the multiple of EPOCH as of which `counts` hold.
        counts: [B, item_no] float32, by item_no so that a growing catalogue moves nothing.
        pending_buckets, pending_items: positives since, oldest first, not yet in `counts`.
        unsaved: whether `counts` have changed since they were committed.

    """

    epoch_offset: int
    counts: Tensor
    half_life: float
    pending_buckets: list[int] = field(default_factory=list)
    pending_items: list[int] = field(default_factory=list)
    unsaved: bool = True

    def add(self, buckets: Ints, item_nos: Ints) -> None:
        """Count positives of the current epoch, oldest first; they take effect with the next."""
        self.pending_buckets.extend(buckets.tolist())
        self.pending_items.extend(item_nos.tolist())
        self._fit(int(item_nos.max(initial=0)))

    def move_to(self, offset: int) -> bool:
        """Let what is pending take effect if `offset` lies in a later epoch. True when the counts changed."""
        epoch = offset // EPOCH * EPOCH
        if epoch <= self.epoch_offset:
            return False
        self.epoch_offset = epoch
        if not self.pending_items:
            return False
        self._fit(max(self.pending_items))  # counts that were read again are as wide as what they hold
        buckets, items = torch.tensor(self.pending_buckets), torch.tensor(self.pending_items)
        self.counts = advance(self.counts, buckets, items, half_life=self.half_life)
        self.pending_buckets, self.pending_items, self.unsaved = [], [], True
        return True

    def of_rows(self, item_nos: Tensor) -> Tensor:
        """Counts [B, N] of the catalogue's rows, given each row's item_no [N]."""
        self._fit(int(item_nos.max()) if len(item_nos) else 0)
        return self.counts[:, item_nos]

    def _fit(self, largest: int) -> None:
        missing = largest + 1 - self.counts.shape[1]
        if missing > 0:
            self.counts = torch.nn.functional.pad(self.counts, (0, missing))
