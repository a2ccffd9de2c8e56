"""What moves online on the item side, owned by a partition, taking effect at fixed offsets.

Position popularity and the counts of item pairs change with every positive, but predictions read them as of the last
multiple of `POPULARITY_EPOCH` and `PAIR_EPOCH` offsets. Cutting the log into other batches therefore cannot change a
score. Pairs belong to a meta version as well: another begins with the pairs that it brings.

Letters: B buckets of K, E events, W newest positives looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import pair_counts, popularity
from models.pair_counts import PairTable, Stakes, learn
from models.popularity import NUM_BUCKETS, advance
from pipeline.support import Ints

__all__ = ["NUM_BUCKETS", "ItemStatistics", "OnlinePairs", "PairEvents"]

SNAPSHOT_EPOCHS = 64  # of pairs, between two snapshots of the pairs, whose log is kept meanwhile


@dataclass(frozen=True, slots=True)
class PairEvents:
    """Positives of one partition within one epoch of pairs: items [E] and what came before each [E, W] (-1 = none)."""

    partition: int
    first_offset: int
    items: NDArray[np.int32]
    before: NDArray[np.int32]

    @property
    def epoch(self) -> int:
        """The offset at which the epoch begins."""
        return self.first_offset - self.first_offset % pair_counts.PAIR_EPOCH


@dataclass(slots=True)
class OnlinePairs:
    """Pairs of one partition under one version.

    Attributes:
        version: the meta version that brought the first of them.
        table: by item_no, as of the last epoch of pairs.
        stakes: of `models.pair_counts.learn`.
        pending: events since, oldest first.
        changed: item numbers whose pairs have changed since they were last asked for.
        snapshot_due: whether the table has to be written whole with the next transaction.
        epochs: epochs since the last snapshot.
        as_brought: whether the table is still what the version brought.

    """

    version: int
    table: PairTable
    stakes: Stakes
    pending: list[PairEvents] = field(default_factory=list)
    changed: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    snapshot_due: bool = True
    epochs: int = 0
    as_brought: bool = True

    def settle(self, epoch: int) -> None:
        """Let events of epochs before this one take effect, epoch by epoch."""
        while self.pending and self.pending[0].epoch < epoch:
            oldest = self.pending[0].epoch
            now = [events for events in self.pending if events.epoch == oldest]
            self.pending, self.as_brought = self.pending[len(now) :], False
            items = torch.from_numpy(np.concatenate([events.items for events in now])).long()
            before = torch.from_numpy(np.concatenate([events.before for events in now])).long()
            self.table = self.table.grown(int(max(items.max(), before.max())) + 1)
            self.changed = torch.unique(torch.cat([self.changed, learn(self.table, before, items, self.stakes)]))

    def take_changed(self) -> Tensor:
        """Hand over what has changed since the last call."""
        changed, self.changed = self.changed, self.changed[:0]
        return changed


@dataclass(frozen=True, slots=True)
class SavedPairs:
    """What the database has: a snapshot, None for what the version brought, and the events logged since."""

    version: int
    table: PairTable | None
    log: list[PairEvents]


@dataclass(slots=True)
class ItemStatistics:
    """Position-popularity counts of one partition.

    Attributes:
        epoch_offset: the multiple of POPULARITY_EPOCH as of which `counts` hold.
        counts: [B, item_no] float32, by item_no so that a growing catalogue moves nothing.
        pending_buckets, pending_items: positives since, oldest first, not yet in `counts`.
        unsaved: whether `counts` have changed since they were written.
        num_saved: how many of those pending have been written beside these counts.
        pairs: pairs counted online, where the version lets them.
        saved_pairs: what the database had of them, until a version takes them up.

    """

    epoch_offset: int
    counts: Tensor
    half_life: float
    pending_buckets: list[int] = field(default_factory=list)
    pending_items: list[int] = field(default_factory=list)
    unsaved: bool = True
    num_saved: int = 0
    pairs: OnlinePairs | None = None
    saved_pairs: SavedPairs | None = None

    @property
    def pair_epoch_offset(self) -> int:
        """The multiple of PAIR_EPOCH as of which pairs hold."""
        return self.epoch_offset - self.epoch_offset % pair_counts.PAIR_EPOCH

    def add(self, buckets: Ints, item_nos: Ints) -> None:
        """Count positives of the current epoch, oldest first; they take effect with the next."""
        self.pending_buckets.extend(buckets.tolist())
        self.pending_items.extend(item_nos.tolist())
        self._fit(int(item_nos.max(initial=0)))

    def move_to(self, offset: int) -> bool:
        """Let what is pending take effect if `offset` lies in a later epoch. True when the counts changed."""
        epoch, pair_epoch = offset - offset % popularity.POPULARITY_EPOCH, self.pair_epoch_offset
        if epoch <= self.epoch_offset:
            return False
        self.epoch_offset = epoch
        if self.pairs and self.pair_epoch_offset > pair_epoch:
            self.pairs.settle(self.pair_epoch_offset)
            self.pairs.epochs += 1
            self.pairs.snapshot_due |= self.pairs.epochs >= SNAPSHOT_EPOCHS
        if not self.pending_items:
            return False
        self._fit(max(self.pending_items))  # counts that were read again are as wide as what they hold
        buckets, items = torch.tensor(self.pending_buckets), torch.tensor(self.pending_items)
        self.counts = advance(self.counts, buckets, items, half_life=self.half_life)
        self.pending_buckets, self.pending_items, self.unsaved = [], [], True
        return True

    def take_pairs(self, version: int, stakes: Stakes, initial: Callable[[], PairTable]) -> None:
        """Go on with this version's pairs, from memory or as they were saved, or begin with what it brings."""
        if self.pairs and self.pairs.version == version:
            return
        saved, self.saved_pairs = self.saved_pairs, None
        if saved and saved.version == version:
            table = initial() if saved.table is None else saved.table
            self.pairs = OnlinePairs(
                version, table, stakes, saved.log, snapshot_due=False, as_brought=saved.table is None
            )
            self.pairs.settle(self.pair_epoch_offset)
            self.leave_no_log()  # somebody may have been forgotten whom the worker before has not heard of
        else:
            self.pairs = OnlinePairs(version, initial(), stakes)

    def leave_no_log(self) -> None:
        """Have the next epoch begin with a snapshot of the pairs: the log tells, without a name, what one user took."""
        if self.pairs:
            self.pairs.epochs = SNAPSHOT_EPOCHS

    def of_rows(self, item_nos: Tensor) -> Tensor:
        """Counts [B, N] of the catalogue's rows, given each row's item_no [N]."""
        self._fit(int(item_nos.max()) if len(item_nos) else 0)
        return self.counts[:, item_nos]

    def _fit(self, largest: int) -> None:
        missing = largest + 1 - self.counts.shape[1]
        if missing > 0:
            self.counts = torch.nn.functional.pad(self.counts, (0, missing))
