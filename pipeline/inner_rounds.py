"""The arithmetic of a micro-batch, chunk by chunk: every positive predicted and learnt from, every user touched listed.

Letters: E events, U users touched, N catalogue items.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.candidates import Candidates
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import Ranker, TaskBatch, Top
from pipeline.catalogue import Catalogue
from pipeline.event_columns import EventColumns
from pipeline.known import Known
from pipeline.outcome import Lists
from pipeline.served_items import ServedItems
from pipeline.support import Ints, UserTable
from pipeline.task_batches import Reading, TaskBatches, padded

NUM_POPULAR = 1000


class InnerRounds:
    """Predicts, adapts and lists under one version and one catalogue snapshot."""

    def __init__(
        self,
        table: UserTable,
        ranker: Ranker,
        catalogue: Catalogue,
        *,
        tasks: TaskBatches,
        served: ServedItems,
        top_n: int,
    ) -> None:
        self._table, self._ranker, self._catalogue = table, ranker, catalogue
        self._tasks, self._served, self._top_n = tasks, served, top_n

    def learn(self, events: EventColumns) -> None:
        """Predict every positive from what was known before it, and move the users' adapters.

        Honest residuals need the start's predictions only, and these do not depend on the adapter: so one pass serves
        several events of a user, whose states follow one another inside a chunk (`previous`) and from chunk to chunk.
        """
        table, ranker = self._table, self._ranker
        known = np.flatnonzero(events.positive & (self._catalogue.row_of[events.items] >= 0))
        for now in self._tasks.chunks(known):
            slots, size = events.slots[now], len(now)
            tasks = self._tasks.of(slots, events.before.of(now), events.reading.of(now), self._served.pair_tables)
            targets, previous = (
                padded(column, -1).to(tasks.support.device)
                for column in (self._catalogue.row_of[events.items[now]], _previous(slots))
            )
            candidates = _candidates_of(events.side.candidates, tasks.prior_rows // NUM_BUCKETS)
            step = ranker.step(tasks, events.side.priors, targets, previous, candidates)
            # of a user's several states the last stays
            table.adapter[slots, : ranker.state_size] = step.state[:size].cpu().numpy()
            table.track[slots, : ranker.track_size] = step.track[:size].cpu().numpy()
            table.adapter_events[slots] = step.state_events[:size].cpu().numpy()
            events.losses[:, now] = torch.stack([step.loss_adapted, step.loss_start])[:, :size].cpu().numpy()
            ranks = torch.stack([step.rank_adapted, step.rank_start, step.rank_popular])
            events.ranks[:, now] = ranks[:, :size].cpu().numpy()

    def lists(self, slots: Ints, events: EventColumns, last: Ints) -> Lists:
        """List what is best for users [U] after their last events, in the epochs of these."""
        if not len(self._catalogue.item_nos):
            return Lists(np.zeros((len(slots), 0), np.int64), np.zeros((len(slots), 0)), np.zeros(len(slots), np.int64))
        side, num_events = events.side, self._table.num_events[slots]
        bases = side.prior_rows[last] // NUM_BUCKETS * NUM_BUCKETS
        buckets = bucket_of(torch.from_numpy(num_events)).numpy()
        reading = Reading(num_events, bases + buckets, side.pair_rows[last])
        tops = []
        for now in self._tasks.chunks(np.arange(len(slots))):
            known = Known.of(self._table, slots[now])
            tasks = self._tasks.of(slots[now], known, reading.of(now), self._served.pair_tables)
            top = self._ranker.rank(tasks, side.priors, min(self._top_n, len(self._catalogue.item_nos)))
            tops.append(top.of(len(now)))
            self._table.adapter_use[slots[now]] = top.use[: len(now)].cpu().numpy()
        return self._as_lists(tops)

    def task(self, slot: int, partition: int) -> tuple[TaskBatch, Tensor]:
        """One user as of now, in the first row, and the priors that it reads."""
        slots = np.array([slot])
        num_events = self._table.num_events[slots]
        priors, pair_row = self._served.current(partition)
        reading = Reading(num_events, bucket_of(torch.from_numpy(num_events)).numpy(), np.array([pair_row]))
        known = Known.of(self._table, slots)
        return self._tasks.of(slots, known, reading, self._served.pair_tables), priors

    def popular(self, partition: int) -> Lists:
        """The list of a user without events, from a partition's current counts; empty while the catalogue is."""
        if not len(self._catalogue.item_nos):
            return self._as_lists([])
        none = np.zeros(0, np.int64)
        tasks = self._tasks.of(none, Known.of(self._table, none), Reading(none, none, none), None)
        top = self._ranker.rank(tasks, self._served.prior(partition), min(NUM_POPULAR, len(self._catalogue.item_nos)))
        return self._as_lists([top.of(1)])

    def _as_lists(self, tops: list[Top]) -> Lists:
        if not tops:
            return Lists(np.zeros((0, 0), np.int64), np.zeros((0, 0)), np.zeros(0, np.int64))
        items = torch.cat([top.items for top in tops]).cpu().numpy()
        scores = torch.sigmoid(torch.cat([top.logits for top in tops]).double()).cpu().numpy()
        listed = items >= 0
        return Lists(np.where(listed, self._catalogue.item_nos[items], 0), scores, listed.sum(1))


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
