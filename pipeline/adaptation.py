"""The inner loop over a micro-batch: who is touched, predicted before each event, adapted in rounds, listed once.

Pure: a micro-batch and the state in memory go in, rows for one transaction come out. Round r takes every user's r-th
event, so each prediction is made with the state after that user's preceding event, whatever else is in the batch.

Letters: E events, U users touched, F inner factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.ranker import Ranker, TaskBatch
from pipeline.batching import (
    APPLIED,
    CONFLICTING,
    DUPLICATE,
    ERASED,
    FOREIGN,
    LIMITED,
    DeadLetter,
    MicroBatch,
    dead_letter,
    fates,
)
from pipeline.catalogue import Catalogue
from pipeline.event_columns import EventColumns
from pipeline.inner_rounds import InnerRounds
from pipeline.item_statistics import ItemStatistics
from pipeline.known import Before, earlier
from pipeline.outcome import Lists, Outcome, Prequential
from pipeline.served_items import ServedItems
from pipeline.support import Ints, Segments, UserTable, occurrence
from pipeline.task_batches import TaskBatches
from schemas.event_types import CODES, DEFAULT_EVENT_TYPES


class Taught(Protocol):
    """What an event type teaches: label 1 liked, 0 refused, None exposure only."""

    @property
    def label(self) -> int | None: ...  # noqa: D102 - said above

    @property
    def weight(self) -> float: ...  # noqa: D102 - how strongly


@dataclass(frozen=True, slots=True)
class Types:
    """Label and weight of each event type, by its stored code."""

    positive: NDArray[np.bool_]
    dismissal: NDArray[np.bool_]
    weight: NDArray[np.float32]

    @classmethod
    def of(cls, overrides: Mapping[str, Taught]) -> Types:
        """Tabulate the default event types, with those that the settings change."""
        size = len(DEFAULT_EVENT_TYPES)
        table = cls(np.zeros(size, bool), np.zeros(size, bool), np.zeros(size, np.float32))
        for code, default in enumerate(DEFAULT_EVENT_TYPES):
            kind: Taught = overrides.get(default.name, default)
            table.positive[code], table.dismissal[code] = kind.label == 1, kind.label == 0
            table.weight[code] = kind.weight
        return table


class Adaptation:
    """Users and item statistics of the partitions a worker holds, under one meta version and one catalogue snapshot."""

    def __init__(self, table: UserTable, types: Types, *, top_n: int, recommend_seen: bool | None = None) -> None:
        self.table = table
        self.statistics: dict[int, ItemStatistics] = {}
        self._types = types
        self._top_n = top_n
        self._recommend_seen_setting = recommend_seen

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
        self.recommend_seen = ranker.parameters.recommend_seen if setting is None else setting
        self.table.widen(ranker.state_size, ranker.track_size)
        tasks = TaskBatches(
            self.table,
            ranker,
            catalogue,
            type_weights=self._types.weight,
            recommend_seen=self.recommend_seen,
        )
        self._served = ServedItems(self.statistics, version, ranker, catalogue)
        self._rounds = InnerRounds(self.table, ranker, catalogue, tasks=tasks, served=self._served, top_n=self._top_n)

    def begin(self, partition: int, offset: int) -> None:
        """Give a partition that has none statistics: the version's counts and pairs, as of this offset's epoch."""
        self._served.begin(partition, offset)

    def take_up(self, partition: int) -> None:
        """Let this version's half-life and pairs hold for a partition's statistics."""
        self._served.take_up(partition)

    def forget(self, partition: int) -> None:
        """Drop what is remembered of a partition: somebody else may have moved it."""
        self.table.forget_partition(partition)
        self.statistics.pop(partition, None)
        self._served.forget(partition)

    def apply(self, batch: MicroBatch) -> Outcome:
        """Decide every event's fate and adapt every user touched. All users must have slots, all items numbers."""
        batch.users = [event.user_id for event in batch.events]
        slots = self._settle_fates(batch, self.table.slots(batch.users))
        self._adopt(slots)
        events = self._events(batch, slots)
        segments = Segments(), Segments()
        self._remember(events, *segments)
        events.side = self._served.read(events.applied())
        self._rounds.learn(events)
        last = np.flatnonzero(occurrence(slots[::-1])[::-1] == 0)
        self.table.last_offset[slots[last]] = batch.offset[last]
        return Outcome(
            batch,
            slots[last],
            self._rounds.lists(slots[last], events, last),
            self._prequential(batch, events),
            *segments,
            {partition: self.statistics[partition] for partition in np.unique(events.partition).tolist()},
            {partition: self.popular(partition) for partition in events.side.moved},
            events.side.pair_events,
            self.version,
            self.ranker.state_size,
            self.ranker.track_size,
        )

    def popular(self, partition: int) -> Lists:
        """The list of a user without events, from a partition's current counts; empty while the catalogue is."""
        return self._rounds.popular(partition)

    def task(self, user_id: str) -> tuple[TaskBatch, Tensor]:
        """A user who has a slot as the ranker takes it now, in the first row, and the priors [R, N] that it reads."""
        slot = int(self.table.slots([user_id])[0])
        return self._rounds.task(slot, int(self.table.partition[slot]))

    def _settle_fates(self, batch: MicroBatch, slots: Ints) -> Ints:
        fate = fates(batch, slots, self.table)
        by_partition = {advance.partition: advance for advance in batch.advances}
        for index in np.flatnonzero(fate != APPLIED).tolist():
            advance = by_partition[int(batch.partition[index])]
            if fate[index] == DUPLICATE:
                advance.duplicates += 1
                continue
            if fate[index] in (ERASED, LIMITED):
                advance.dropped += 1
                advance.rate_limited += int(fate[index] == LIMITED)
                continue
            advance.dead_lettered += 1
            batch.dead_letters.append(self._rejected(batch, index, int(fate[index]), int(slots[index])))
        applied = fate == APPLIED
        for partition in batch.partition[applied].tolist():
            by_partition[partition].applied += 1
        batch.keep(applied)
        kept: Ints = slots[applied]
        if (fate == ERASED).any():  # nobody stays in memory whom no row tells of
            unknown = slots[self.table.num_applied[slots] == 0]
            self.table.forget(set(self.table.user_ids(np.setdiff1d(unknown, kept))))
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

    def _events(self, batch: MicroBatch, slots: Ints) -> EventColumns:
        number_of, num = self.catalogue.number_of, len(slots)
        types = np.fromiter((CODES[event.type] for event in batch.events), np.int64, num)
        items = np.fromiter((number_of[event.item_id] for event in batch.events), np.int64, num)
        positive = self._types.positive[types]
        return EventColumns(
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

    def _remember(self, events: EventColumns, id_segments: Segments, seen_segments: Segments) -> None:
        """Move the users' memory past the batch, noting what each event's prediction may know."""
        table, slots, positive = self.table, events.slots, events.positive
        marks = np.where(positive, events.items, np.where(self._types.dismissal[events.types], -events.items, 0))
        events.before = Before(table, slots, (events.items, events.types), positive=positive, marks=marks)
        table.append_ids(slots, events.ids, events.bodies, id_segments)
        table.spend(slots, events.record_ms)
        table.append_positive(slots[positive], events.items[positive], events.types[positive])
        table.append_seen(slots[marks != 0], marks[marks != 0], seen_segments)

    def _prequential(self, batch: MicroBatch, events: EventColumns) -> Prequential:
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
