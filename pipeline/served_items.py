"""The item side of the partitions that a worker holds, as one version and one catalogue snapshot read it.

`ItemStatistics` belong to a partition whatever the version; this lays them out by catalogue row where events read them:
a block of priors, and a block of pairs where the version counts them online, per partition and epoch.

Letters: E events, B buckets of K, N catalogue items, R prior rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import pair_counts, popularity
from models.candidates import Candidates
from models.neighbours import Blocks, initial_pairs, stakes_of
from models.pair_counts import WINDOW, PairTable
from models.popularity import NUM_BUCKETS, bucket_of, priors
from models.ranker import Ranker
from pipeline.catalogue import Catalogue
from pipeline.item_statistics import ItemStatistics, OnlinePairs, PairEvents
from pipeline.known import Before
from pipeline.served_pairs import ServedPairs
from pipeline.support import Ints


@dataclass(slots=True)
class ItemSide:
    """What the events of a micro-batch read, and what has moved.

    Attributes:
        prior_rows, pair_rows: [E] the event's row of `priors`, the first row of its block of pairs.
        priors: [R, N] blocks of NUM_BUCKETS rows.
        candidates: one for each block of priors, None while the catalogue is small.
        moved: partitions whose counts have taken effect.
        pair_events: what the pairs' log has to keep.

    """

    prior_rows: Ints
    pair_rows: Ints
    priors: Tensor
    candidates: list[Candidates | None] = field(default_factory=list)
    moved: set[int] = field(default_factory=set)
    pair_events: list[PairEvents] = field(default_factory=list)


class Applied(NamedTuple):
    """Events of a batch in (partition, offset) order [E]: K, items, whether they count, what was known before."""

    partition: Ints
    offset: Ints
    num_events: Ints
    items: Ints
    positive: NDArray[np.bool_]
    before: Before


class ServedItems:
    """Priors and pairs of the partitions, under one version and one catalogue snapshot."""

    def __init__(
        self, statistics: dict[int, ItemStatistics], version: int, ranker: Ranker, catalogue: Catalogue
    ) -> None:
        """Read these statistics, which other versions may read as well."""
        self._statistics, self._version, self._ranker, self._catalogue = statistics, version, ranker, catalogue
        self._row_nos = torch.from_numpy(catalogue.item_nos)
        self._priors: dict[int, tuple[int, Tensor]] = {}
        online = ranker.parameters.pairs_online
        self._pairs = ServedPairs(catalogue.tables, catalogue.item_nos, lambda: catalogue.row_of) if online else None

    @property
    def pair_tables(self) -> Blocks | None:
        """The blocks of pairs; None where those of the version are served."""
        return self._pairs.tables if self._pairs else None

    def begin(self, partition: int, offset: int) -> None:
        """Statistics of a partition that has none yet: the version's counts, as of this offset's epoch."""
        parameters = self._ranker.parameters
        counts = torch.zeros(NUM_BUCKETS, len(self._catalogue.row_of))
        numbers = self._numbers()
        counts[:, numbers[numbers >= 0]] = parameters.counts[:, numbers >= 0].cpu()
        epoch_offset = offset - offset % popularity.POPULARITY_EPOCH
        self._statistics[partition] = ItemStatistics(epoch_offset, counts, parameters.half_life)
        self.take_up(partition)

    def take_up(self, partition: int) -> None:
        """Let this version's half-life and pairs hold for a partition's statistics."""
        parameters, statistics = self._ranker.parameters, self._statistics[partition]
        statistics.half_life = parameters.half_life
        if self._pairs:
            statistics.take_pairs(self._version, stakes_of(parameters), self._initial_pairs)
        else:
            statistics.pairs = statistics.saved_pairs = None

    def forget(self, partition: int) -> None:
        """Drop what is laid out of a partition."""
        self._priors.pop(partition, None)
        if self._pairs:
            self._pairs.forget(partition)

    def read(self, events: Applied) -> ItemSide:
        """Advance the statistics past a batch, and note what each event reads.

        Counting needs no scores, so all epochs of the batch are known before its first prediction.
        """
        none = np.zeros(len(events.offset), np.int64)
        side, blocks = ItemSide(none, none.copy(), torch.zeros(0, 0)), list[Tensor]()
        buckets = bucket_of(torch.from_numpy(events.num_events)).numpy()
        if self._pairs:
            self._pairs.begin_batch()
        for now in _stretches(events.partition, events.offset // pair_counts.PAIR_EPOCH):
            partition = int(events.partition[now[0]])
            statistics = self._statistics[partition]
            candidates = self._ranker.candidates(int(events.offset[now[0]]) // pair_counts.PAIR_EPOCH)
            for some in _stretches(events.offset[now] // popularity.POPULARITY_EPOCH):
                soon = now[some]
                if statistics.move_to(int(events.offset[soon[0]])):
                    side.moved.add(partition)
                side.prior_rows[soon] = len(blocks) * NUM_BUCKETS + buckets[soon]
                blocks.append(self.prior(partition))
                side.candidates.append(candidates)
                counted = soon[events.positive[soon]]
                statistics.add(buckets[counted], events.items[counted])
            if self._pairs and statistics.pairs:
                side.pair_rows[now] = self._pairs.first_row(partition, statistics.pairs)
                side.pair_events += _pending_pairs(statistics.pairs, events, now[events.positive[now]])
        if blocks:
            side.priors = torch.cat(blocks)
        return side

    def current(self, partition: int) -> tuple[Tensor, int]:
        """Priors [B, N] and the first row of the block of pairs, as a partition's epoch has them."""
        pairs = self._statistics[partition].pairs
        return self.prior(partition), self._pairs.first_row(partition, pairs) if self._pairs and pairs else 0

    def prior(self, partition: int) -> Tensor:
        """Priors [B, N] of a partition's current epoch."""
        if not len(self._row_nos):
            return torch.zeros(NUM_BUCKETS, 0)
        statistics = self._statistics[partition]
        epoch, prior = self._priors.get(partition, (-1, torch.zeros(0)))
        if epoch != statistics.epoch_offset:
            prior = priors(statistics.of_rows(self._row_nos).to(self._ranker.items.vectors.device))
            self._priors[partition] = statistics.epoch_offset, prior
        return prior

    def _initial_pairs(self) -> PairTable:
        return initial_pairs(self._ranker.parameters, self._numbers(), len(self._catalogue.row_of))

    def _numbers(self) -> Tensor:
        """Item numbers of the version's items [n], -1 for those that have none: nobody but this version knows them."""
        numbers = [self._catalogue.number_of.get(item_id, -1) for item_id in self._ranker.parameters.item_ids]
        return torch.tensor(numbers, dtype=torch.int64)


def _pending_pairs(pairs: OnlinePairs, events: Applied, counted: Ints) -> list[PairEvents]:
    """Let the positives of one partition and epoch take effect with the next epoch; gives them, if there are any."""
    if not len(counted):
        return []
    newest = events.before.newest_items(counted, WINDOW)
    newest[newest == 0] = -1
    items = events.items[counted].astype(np.int32)
    found = PairEvents(int(events.partition[counted[0]]), int(events.offset[counted[0]]), items, newest)
    pairs.pending.append(found)
    return [found]


def _stretches(*columns: Ints) -> Iterator[Ints]:
    """Places [n] of neighbours that are equal in all columns [E], one stretch after the other."""
    differ = np.any([np.diff(column) != 0 for column in columns], axis=0)
    for now in np.split(np.arange(len(columns[0])), np.flatnonzero(differ) + 1):
        if len(now):
            yield now
