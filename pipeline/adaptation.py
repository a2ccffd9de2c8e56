"""The inner loop over a micro-batch: who is touched, predicted before each event, adapted in rounds, listed once.

Pure: a micro-batch and the state in memory go in, rows for one transaction come out. Round r takes every user's r-th
event, so each prediction is made with the state after that user's preceding event, whatever else is in the batch.

Letters: E events, U users touched, S support slots, N catalogue items, R prior rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.candidates import Candidates
from models.item_tables import initial_counts
from models.neighbours import initial_pairs, stakes_of
from models.pair_counts import WINDOW, PairTable
from models.popularity import NUM_BUCKETS, bucket_of, priors
from models.ranker import Ranker, TaskBatch, Top
from pipeline.batching import (
    APPLIED,
    CONFLICTING,
    DUPLICATE,
    FOREIGN,
    DeadLetter,
    MicroBatch,
    dead_letter,
    fates,
)
from pipeline.catalogue import Catalogue
from pipeline.item_statistics import EPOCH, ItemStatistics, PairEvents
from pipeline.known import Before, Known, earlier
from pipeline.outcome import Lists, Outcome, Prequential, joined
from pipeline.served_pairs import ServedPairs
from pipeline.support import Ints, Segments, UserTable, occurrence
from schemas.event_types import CODES, DEFAULT_EVENT_TYPES

# Users per call of the ranker. Padding to one of few sizes keeps a row's result independent of the others, to the bit:
# matrix kernels give the same rows at any of these sizes, but not below four rows.
CHUNK_SIZES = (8, 16, 32, 64, 128)
NUM_POPULAR = 1000


@dataclass(frozen=True, slots=True)
class Types:
    """Label and weight of each event type, by its stored code."""

    positive: NDArray[np.bool_]
    dismissal: NDArray[np.bool_]
    weight: NDArray[np.float32]

    @classmethod
    def of(cls, overrides: Mapping[str, tuple[int | None, float]]) -> Types:
        """Tabulate the default event types, with (label, weight) of those that the settings change."""
        size = len(DEFAULT_EVENT_TYPES)
        table = cls(np.zeros(size, bool), np.zeros(size, bool), np.zeros(size, np.float32))
        for code, (name, default_label, default_weight) in enumerate(DEFAULT_EVENT_TYPES):
            label, weight = overrides.get(name, (default_label, default_weight))
            table.positive[code], table.dismissal[code], table.weight[code] = label == 1, label == 0, weight
        return table


@dataclass(slots=True)
class _Events:
    """The applied events of a micro-batch as columns [E], the priors they read [R, N], and what was predicted."""

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
    prior_rows: Ints = field(init=False)
    priors: Tensor = field(init=False)
    candidates: list[Candidates | None] = field(default_factory=list)
    losses: NDArray[np.float32] = field(init=False)
    ranks: Ints = field(init=False)

    def __post_init__(self) -> None:
        num = len(self.slots)
        self.prior_rows, self.priors = np.zeros(num, np.int64), torch.zeros(0, 0)
        self.losses, self.ranks = np.zeros((2, num), np.float32), np.zeros((3, num), np.int64)


class Adaptation:
    """Users and item statistics of the partitions a worker holds, under one meta version and one catalogue snapshot."""

    def __init__(self, table: UserTable, types: Types, *, top_n: int, recommend_seen: bool | None = None) -> None:
        self.table = table
        self.statistics: dict[int, ItemStatistics] = {}
        self._types = types
        self._top_n = top_n
        self._recommend_seen_setting = recommend_seen
        self._priors: dict[int, tuple[int, Tensor]] = {}
        self._pairs: ServedPairs | None = None

    def beside(self) -> Adaptation:
        """Another, over the same users and statistics, for partitions under another version."""
        other = Adaptation(self.table, self._types, top_n=self._top_n, recommend_seen=self._recommend_seen_setting)
        other.statistics = self.statistics
        return other

    def activate(
        self,
        version: int,
        ranker: Ranker,
        catalogue: Catalogue,
        state_maps: Mapping[int, NDArray[np.float64]] | None = None,
    ) -> None:
        """Take a meta version and a catalogue snapshot into use from the next micro-batch on.

        `state_maps` [F of it, F], by earlier version, carry users' inner states over; other states begin anew.
        """
        self.version, self.ranker, self.catalogue = version, ranker, catalogue
        self._state_maps = state_maps or {}
        setting = self._recommend_seen_setting
        self.table.widen(ranker.state_size, ranker.track_size)
        self._recommend_seen = ranker.parameters.recommend_seen if setting is None else setting
        self._row_nos = torch.from_numpy(catalogue.item_nos)
        self._withdrawn = torch.from_numpy(catalogue.unavailable).to(ranker.items.vectors.device)
        self._priors = {}
        online = ranker.parameters.pairs_online
        self._pairs = ServedPairs(catalogue.tables, catalogue.item_nos, lambda: catalogue.row_of) if online else None

    def initial_statistics(self, offset: int) -> ItemStatistics:
        """Statistics of a partition that has none yet: the version's counts, as of this offset's epoch."""
        counts = torch.zeros(NUM_BUCKETS, len(self.catalogue.row_of))
        counts[:, self._row_nos] = initial_counts(self.ranker.parameters, self.catalogue.tables.trained_index).cpu()
        return ItemStatistics(offset // EPOCH * EPOCH, counts, self.ranker.parameters.half_life)

    def take_up(self, partition: int) -> None:
        """Let this version's half-life and pairs hold for a partition's statistics."""
        parameters, statistics = self.ranker.parameters, self.statistics[partition]
        statistics.half_life = parameters.half_life
        if not parameters.pairs_online:
            statistics.pairs = None
            return
        statistics.take_pairs(self.version, stakes_of(parameters), self._initial_pairs)

    def _initial_pairs(self) -> PairTable:
        numbers = [self.catalogue.number_of.get(item_id, -1) for item_id in self.ranker.parameters.item_ids]
        return initial_pairs(self.ranker.parameters, torch.tensor(numbers), len(self.catalogue.row_of))

    def forget(self, partition: int) -> None:
        """Drop what is remembered of a partition: somebody else may have moved it."""
        self.table.forget_partition(partition)
        self.statistics.pop(partition, None)
        self._priors.pop(partition, None)
        if self._pairs:
            self._pairs.forget(partition)

    def apply(self, batch: MicroBatch) -> Outcome:
        """Decide every event's fate and adapt every user touched. All users must have slots, all items numbers."""
        slots = self._settle_fates(batch, self.table.slots([event.user_id for event in batch.events]))
        self._adopt(slots)
        events = self._events(batch, slots)
        segments = Segments(), Segments()
        self._remember(events, *segments)
        is_last = occurrence(slots[::-1])[::-1] == 0
        changed, lists, ended, log = set[int](), list[Lists](), [np.zeros(0, np.int64)], list[PairEvents]()
        for now in _waves(events.partition, events.offset):
            changed |= self._read_item_side(events, now, log)
            self._learn(events, now)
            ended.append(now[is_last[now]])
            if len(ended[-1]):
                bases = events.prior_rows[ended[-1]] // NUM_BUCKETS * NUM_BUCKETS
                lists.append(self._list(slots[ended[-1]], events.priors, bases))
        last = np.concatenate(ended)
        self.table.last_offset[slots[last]] = batch.offset[last]
        return Outcome(
            batch,
            slots[last],
            joined(lists),
            self._prequential(batch, events),
            *segments,
            {partition: self.statistics[partition] for partition in np.unique(events.partition).tolist()},
            {partition: self.popular(partition) for partition in changed},
            log,
            self.version,
            self.ranker.state_size,
            self.ranker.track_size,
        )

    def popular(self, partition: int) -> Lists:
        """The list of a user without events, from a partition's current counts; empty while the catalogue is."""
        if not len(self._row_nos):
            return self._lists([])
        current = self._prior(partition)
        none = np.zeros(0, np.int64)
        tasks = self._tasks(none, Known.of(self.table, none), none, none)
        top = self.ranker.rank(tasks, current, min(NUM_POPULAR, len(self._row_nos)))
        return self._lists([top.of(1)])

    def _settle_fates(self, batch: MicroBatch, slots: Ints) -> Ints:
        fate = fates(batch, slots, self.table)
        by_partition = {advance.partition: advance for advance in batch.advances}
        for index in np.flatnonzero(fate != APPLIED).tolist():
            advance = by_partition[int(batch.partition[index])]
            if fate[index] == DUPLICATE:
                advance.duplicates += 1
                continue
            advance.dead_lettered += 1
            batch.dead_letters.append(self._rejected(batch, index, int(fate[index]), int(slots[index])))
        applied = fate == APPLIED
        for partition in batch.partition[applied].tolist():
            by_partition[partition].applied += 1
        batch.keep(applied)
        kept: Ints = slots[applied]
        return kept

    def _rejected(self, batch: MicroBatch, index: int, fate: int, slot: int) -> DeadLetter:
        reason, detail = {
            CONFLICTING: ("CONFLICTING_DUPLICATE", "this event_id came before with another body"),
            FOREIGN: ("KEY_MISMATCH", f"this user's events live in partition {self.table.partition[slot]}"),
        }[fate]
        return dead_letter(batch.records[index], reason, detail)

    def _adopt(self, slots: Ints) -> None:
        """Carry states of other versions over to this one, by its maps where it has one; nothing is replayed.

        What an adapter earned under another version says nothing of it under this one: every gate begins anew.
        """
        table, size = self.table, self.ranker.state_size
        stale = np.unique(slots[table.meta_version[slots] != self.version])
        found = table.meta_version[stale]
        table.track[stale] = 0
        for version in np.unique(found).tolist():
            mine = stale[found == version]
            state_map = self._state_maps.get(version)
            if state_map is None:
                table.adapter[mine], table.adapter_events[mine] = 0, 0
                continue
            # In double precision, so that a row does not depend on which others are mapped beside it.
            mapped = table.adapter[mine, : len(state_map)].astype(np.float64) @ state_map
            table.adapter[mine] = 0
            table.adapter[mine, :size] = mapped
        table.meta_version[stale] = self.version

    def _events(self, batch: MicroBatch, slots: Ints) -> _Events:
        number_of, num = self.catalogue.number_of, len(slots)
        types = np.fromiter((CODES[event.type] for event in batch.events), np.int64, num)
        items = np.fromiter((number_of[event.item_id] for event in batch.events), np.int64, num)
        positive = self._types.positive[types]
        return _Events(
            slots,
            batch.partition,
            batch.offset,
            batch.record_ms,
            np.fromiter((event.id_hash for event in batch.events), np.int64, num),
            np.fromiter((event.body_hash for event in batch.events), np.int64, num),
            types,
            items,
            positive,
            num_events=self.table.num_events[slots] + earlier(slots, positive),
        )

    def _read_item_side(self, events: _Events, now: Ints, log: list[PairEvents]) -> set[int]:
        """Move the item side to the epochs of a wave, note what its events read, and count them.

        Gives the partitions whose counts have moved; `log` gets the pairs' events.
        """
        changed, blocks, events.candidates = set[int](), list[Tensor](), []
        buckets = bucket_of(torch.from_numpy(events.num_events[now])).numpy()
        for partition in np.unique(events.partition[now]).tolist():
            within = events.partition[now] == partition
            mine, statistics = now[within], self.statistics[partition]
            if statistics.move_to(int(events.offset[mine[0]])):
                changed.add(partition)
            self._refresh_pairs(partition)
            events.prior_rows[mine] = len(blocks) * NUM_BUCKETS + buckets[within]
            blocks.append(self._prior(partition))
            events.candidates.append(self.ranker.candidates(int(events.offset[mine[0]]) // EPOCH))
            counted = events.positive[mine]
            statistics.add(buckets[within][counted], events.items[mine[counted]])
            self._count_pairs(events, mine[counted], log)
        events.priors = torch.cat(blocks)
        return changed

    def _refresh_pairs(self, partition: int) -> None:
        pairs = self.statistics[partition].pairs
        if self._pairs and pairs:
            changed = pairs.take_changed()
            if len(changed) or not self._pairs.holds(partition):
                self._pairs.refresh(partition, pairs.table, changed)

    def _count_pairs(self, events: _Events, counted: Ints, log: list[PairEvents]) -> None:
        """Let the positives of one partition and epoch take effect with the next epoch."""
        if not len(counted):
            return
        partition = int(events.partition[counted[0]])
        pairs = self.statistics[partition].pairs
        if pairs:
            before = events.before.newest_items(counted, WINDOW)
            items = events.items[counted].astype(np.int32)
            found = PairEvents(partition, int(events.offset[counted[0]]), items, np.where(before > 0, before, -1))
            pairs.pending.append(found)
            log.append(found)

    def _prior(self, partition: int) -> Tensor:
        """Priors [B, N] of a partition's current epoch."""
        if not len(self._row_nos):
            return torch.zeros(NUM_BUCKETS, 0)
        statistics = self.statistics[partition]
        epoch, prior = self._priors.get(partition, (-1, torch.zeros(0)))
        if epoch != statistics.epoch_offset:
            prior = priors(statistics.of_rows(self._row_nos).to(self.ranker.items.vectors.device))
            self._priors[partition] = statistics.epoch_offset, prior
        return prior

    def _remember(self, events: _Events, id_segments: Segments, seen_segments: Segments) -> None:
        """Move the users' memory past the batch, noting what each event's prediction may know."""
        table, slots, positive = self.table, events.slots, events.positive
        marks = np.where(positive, events.items, np.where(self._types.dismissal[events.types], -events.items, 0))
        events.before = Before(table, slots, (events.items, events.types), positive=positive, marks=marks)
        table.append_ids(slots, events.ids, events.bodies, id_segments)
        table.append_positive(slots[positive], events.items[positive], events.types[positive])
        table.append_seen(slots[marks != 0], marks[marks != 0], seen_segments)

    def _learn(self, events: _Events, wave: Ints) -> None:
        """Predict every positive of a wave from what was known before it, and move the users' adapters.

        Honest residuals need the start's predictions only, and these do not depend on the adapter: so one pass serves
        several events of a user, whose states follow one another inside a chunk (`previous`) and from chunk to chunk.
        """
        rows = self.catalogue.row_of[events.items]
        for now in _chunks(wave[(events.positive & (rows >= 0))[wave]]):
            slots, size = events.slots[now], len(now)
            tasks = self._tasks(slots, events.before.of(now), events.num_events[now], events.prior_rows[now])
            targets, previous = (
                _padded(column, -1).to(tasks.support.device) for column in (rows[now], _previous(slots))
            )
            candidates = _candidates_of(events.candidates, tasks.prior_rows // NUM_BUCKETS)
            step = self.ranker.step(tasks, events.priors, targets, previous, candidates)
            # of a user's several states the last stays
            self.table.adapter[slots, : self.ranker.state_size] = step.state[:size].cpu().numpy()
            self.table.track[slots, : self.ranker.track_size] = step.track[:size].cpu().numpy()
            self.table.adapter_events[slots] = step.state_events[:size].cpu().numpy()
            events.losses[:, now] = torch.stack([step.loss_adapted, step.loss_start])[:, :size].cpu().numpy()
            ranks = torch.stack([step.rank_adapted, step.rank_start, step.rank_popular])
            events.ranks[:, now] = ranks[:, :size].cpu().numpy()

    def _prequential(self, batch: MicroBatch, events: _Events) -> Prequential:
        chosen = np.flatnonzero(events.positive)
        interactions = [batch.events[place] for place in chosen.tolist()]
        held = np.append(self.catalogue.tables.trained_index.cpu().numpy() >= 0, False)  # row -1 is no row
        counts = {
            partition: np.bincount(events.types[events.partition == partition], minlength=len(CODES))
            for partition in np.unique(events.partition).tolist()
        }
        return Prequential(
            partition=events.partition[chosen],
            offset=events.offset[chosen],
            record_ms=events.record_ms[chosen],
            user_ids=self.table.user_ids(events.slots[chosen]),
            item_nos=events.items[chosen],
            types=events.types[chosen],
            num_events=events.num_events[chosen],
            loss_adapted=events.losses[0, chosen],
            loss_start=events.losses[1, chosen],
            rank_adapted=events.ranks[0, chosen],
            rank_start=events.ranks[1, chosen],
            rank_popular=events.ranks[2, chosen],
            event_ms=np.fromiter((event.ts_ms for event in interactions), np.int64, len(chosen)),
            new_items=~held[self.catalogue.row_of[events.items[chosen]]],
            scenes=[event.scene for event in interactions],
            applied_types=counts,
        )

    def _list(self, slots: Ints, stacked: Tensor, bases: Ints) -> Lists:
        if not len(self._row_nos):
            return Lists(np.zeros((len(slots), 0), np.int64), np.zeros((len(slots), 0)), np.zeros(len(slots), np.int64))
        rows = bases + bucket_of(torch.from_numpy(self.table.num_events[slots])).numpy()
        k = min(self._top_n, len(self._row_nos))
        tops = []
        for now in _chunks(np.arange(len(slots))):
            known = Known.of(self.table, slots[now])
            tasks = self._tasks(slots[now], known, self.table.num_events[slots[now]], rows[now])
            top = self.ranker.rank(tasks, stacked, k)
            tops.append(top.of(len(now)))
            self.table.adapter_use[slots[now]] = top.use[: len(now)].cpu().numpy()
        return self._lists(tops)

    def _lists(self, tops: list[Top]) -> Lists:
        if not tops:
            return Lists(np.zeros((0, 0), np.int64), np.zeros((0, 0)), np.zeros(0, np.int64))
        items = torch.cat([top.items for top in tops]).cpu().numpy()
        scores = torch.sigmoid(torch.cat([top.logits for top in tops]).double()).cpu().numpy()
        listed = items >= 0
        return Lists(np.where(listed, self.catalogue.item_nos[items], 0), scores, listed.sum(1))

    def _tasks(self, slots: Ints, known: Known, num_events: Ints, prior_rows: Ints) -> TaskBatch:
        table, device = self.table, self.ranker.items.vectors.device
        size = self.ranker.parameters.support_size
        columns = {
            "support": _padded(self.catalogue.row_of[known.support_items[:, -size:]], -1),
            "weights": _padded(self._types.weight[known.support_types[:, -size:]], 0),
            "num_events": _padded(num_events, 0),
            "state": _padded(table.adapter[slots, : self.ranker.state_size], 0),
            "state_events": _padded(table.adapter_events[slots], 0),
            "track": _padded(table.track[slots, : self.ranker.track_size], 0),
            "prior_rows": _padded(prior_rows, 0),
        }
        moved = {name: column.to(device) for name, column in columns.items()}
        neighbours = self._pairs.of(_filled(table.partition[slots], len(columns["support"]))) if self._pairs else None
        excluded = self._excluded(known, len(columns["support"]))
        return TaskBatch(**moved, excluded=excluded, neighbours=neighbours)

    def _excluded(self, known: Known, size: int) -> Tensor:
        """Dismissed, withdrawn and (unless repeated) seen items at -inf, the others at 0 [size, N]."""
        device, num_items = self.ranker.items.vectors.device, len(self._row_nos)
        rows = self.catalogue.row_of[np.abs(known.marks)]
        if self._recommend_seen:
            rows[known.marks > 0] = -1
        # one column more in front, for items without a row (-1)
        excluded = torch.zeros(size, 1 + num_items, device=device)
        rows += np.repeat(np.arange(len(known.num_marks)) * (1 + num_items) + 1, known.num_marks)
        excluded.view(-1).index_fill_(0, torch.from_numpy(rows).to(device), -torch.inf)
        excluded[:, 1:].index_fill_(1, self._withdrawn, -torch.inf)
        return excluded[:, 1:]


def _candidates_of(blocks: list[Candidates | None], block: Tensor) -> Candidates | None:
    """Candidates [U, C] of the blocks [U] of priors that the users read; None for a small catalogue."""
    drawn = [candidates for candidates in blocks if candidates is not None]
    if not drawn:
        return None
    columns, correction = (torch.stack(column)[block] for column in zip(*drawn, strict=True))
    return Candidates(columns, correction)


def _previous(slots: Ints) -> Ints:
    """For each event [E], the place of the same user's event before it, -1 for a user's first."""
    order = np.argsort(slots, kind="stable")
    result = np.full(len(slots), -1)
    again = slots[order][1:] == slots[order][:-1]
    result[order[1:][again]] = order[:-1][again]
    return result


def _waves(partitions: Ints, offsets: Ints) -> Iterator[Ints]:
    """Places of events in (partition, offset) order, cut where a partition enters its next epoch."""
    keys, block = np.unique(np.stack([partitions, offsets // EPOCH]), axis=1, return_inverse=True)
    wave = np.r_[0, np.cumsum(keys[0][1:] == keys[0][:-1])][block.ravel()]
    for number in range(int(wave.max(initial=-1)) + 1):
        yield np.flatnonzero(wave == number)


def _chunks(indices: Ints) -> Iterator[Ints]:
    largest = CHUNK_SIZES[-1]
    for first in range(0, len(indices), largest):
        yield indices[first : first + largest]


def _filled(partitions: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """Partitions [U] made `size` long by repeating the first; none stay none."""
    return np.pad(partitions, (0, size - len(partitions)), mode="edge") if len(partitions) else partitions


def _padded(rows: NDArray[np.generic], value: int) -> Tensor:
    """Rows [n, …] padded to the next of CHUNK_SIZES."""
    size = next(size for size in CHUNK_SIZES if size >= len(rows))
    if size == len(rows):
        return torch.from_numpy(np.ascontiguousarray(rows))
    padded = np.full((size, *rows.shape[1:]), value, rows.dtype)
    padded[: len(rows)] = rows
    return torch.from_numpy(padded)
