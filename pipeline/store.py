"""Postgres as the truth: read positions, users and catalogue; write a micro-batch in one transaction.

Every statement stands as SQL with a name, here, in `partition_rows` or in `batch_rows`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg2.extensions
from sqlalchemy import Engine

from pipeline.batch_rows import INCOMING, BatchRows
from pipeline.batching import Advance
from pipeline.failpoints import reach
from pipeline.forgotten import Forgotten
from pipeline.item_statistics import ItemStatistics
from pipeline.outcome import Lists, Outcome
from pipeline.partition_rows import (
    ACCEPT_GAP,
    INSERT_POSITION,
    READ_POSITIONS,
    RECORD_ACTIVATION,
    execute,
    load_statistics,
    mark_saved,
    move_positions,
    pair_rows,
    popular_rows,
    statistics_rows,
)
from pipeline.session import Session
from pipeline.support import UserTable

LOAD_USERS = """SELECT user_id, partition, last_offset, num_events, num_applied, support_items, support_types, adapter,
    track, adapter_events, meta_version, recent_ids, recent_bodies, recent_seen, num_seen, due_us
    FROM innerloop.user_state WHERE user_id = ANY(%s)"""
LOAD_EVENT_IDS = """SELECT user_id, ids, bodies FROM innerloop.event_ids
    WHERE user_id = ANY(%s) ORDER BY user_id, segment"""
LOAD_SEEN_ITEMS = "SELECT user_id, items FROM innerloop.seen_items WHERE user_id = ANY(%s) ORDER BY user_id, segment"
HEADS = """SELECT (SELECT version FROM innerloop.meta_versions WHERE status = 'live'), canary.version,
    coalesce(canary.canary_partitions, '{}'), coalesce((SELECT max(snapshot) FROM innerloop.catalogue_snapshots), 0)
    FROM (SELECT) AS always LEFT JOIN innerloop.meta_versions canary ON canary.status = 'canary'"""
RECORD_REFUSAL = """INSERT INTO innerloop.audit (actor, action, subject, detail)
    VALUES ('worker', 'refuse', %s, jsonb_build_object('reason', %s))"""


@dataclass(frozen=True, slots=True)
class Heads:
    """The live version (None before the first), the canary with its partitions, and the newest catalogue snapshot."""

    live: int | None
    canary: int | None
    canary_partitions: frozenset[int]
    snapshot: int

    def version_of(self, partition: int) -> int | None:
        """The version that a partition is to be adapted under."""
        return self.canary if partition in self.canary_partitions else self.live


class Store:
    """Two connections, opened when needed: one for the thread that this belongs to, one that commits batches."""

    def __init__(self, engine: Engine, *, id_horizon: int, seen_horizon: int) -> None:
        self._session, self._writing = Session(engine), Session(engine, prepare=INCOMING)
        self._thread = ThreadPoolExecutor(1, "innerloop-writer")
        self._written: Future[float] | None = None
        self._horizons = id_horizon, seen_horizon
        self._forgotten = Forgotten()

    def transaction(self) -> AbstractContextManager[psycopg2.extensions.cursor]:
        """One transaction, committed at the end of the block. Passing failures become StoreUnavailable."""
        return self._session.transaction()

    def close(self) -> None:
        """Let what was begun end, and drop the connections."""
        self._thread.shutdown()
        self._session.close()
        self._writing.close()

    def positions(self, topic: str, partitions: Iterable[int]) -> dict[int, int]:
        """Next offsets of those partitions that have a row."""
        with self.transaction() as cursor:
            cursor.execute(READ_POSITIONS, (topic, list(partitions)))
            return dict(cursor.fetchall())

    def begin_partition(self, topic: str, partition: int, first_offset: int) -> None:
        """Give a partition that was never read its position."""
        with self.transaction() as cursor:
            cursor.execute(INSERT_POSITION, (topic, partition, first_offset, first_offset))

    def accept_gap(self, topic: str, partition: int, *, start: int, end: int) -> None:
        """Count the offsets [start, end), which the broker no longer has, as skipped."""
        with self.transaction() as cursor:
            cursor.execute(ACCEPT_GAP, (end, end - start, topic, partition, start))

    def heads(self) -> Heads:
        """What is to be in use now; the snapshot is 0 before the first."""
        with self.transaction() as cursor:
            cursor.execute(HEADS)
            live, canary, partitions, snapshot = cursor.fetchone() or (None, None, [], 0)
            return Heads(live, canary, frozenset(partitions), snapshot)

    def refused(self, version: int, reason: str) -> None:
        """Record that a version was not taken into use here."""
        with self.transaction() as cursor:
            cursor.execute(RECORD_REFUSAL, (f"version {version}", reason))

    def forget_erased(self, table: UserTable) -> bool:
        """Drop from memory who asked to be forgotten since the last call, and say whether anybody did.

        To be called once before users are loaded.
        """
        with self.transaction() as cursor:
            hashes = self._forgotten.take_up(cursor)
        table.forget(self._forgotten.among(table.users(), hashes))
        return bool(hashes)

    def load_users(self, table: UserTable, user_ids: Sequence[str], partitions: Mapping[str, int]) -> None:
        """Give users slots: with their rows' state, or empty in the partition of their first event."""
        with self.transaction() as cursor:
            cursor.execute(LOAD_USERS, (list(user_ids),))
            rows = cursor.fetchall()
            stored = [row[0] for row in rows]
            known = set(stored)
            new = [user_id for user_id in user_ids if user_id not in known]
            table.admit(new, [partitions[user_id] for user_id in new])
            if rows:
                slots = table.admit(stored, [row[1] for row in rows])
                table.restore(slots, rows)
                self._load_segments(cursor, table, stored, slots)
            times = self._forgotten.times(cursor, user_ids)
            table.erased_ms[table.slots(list(times))] = list(times.values())

    def load_statistics(self, topic: str, partitions: Iterable[int], half_life: float) -> dict[int, ItemStatistics]:
        """Item statistics of those partitions that have some."""
        with self.transaction() as cursor:
            return load_statistics(cursor, topic, list(partitions), half_life)

    def rows(self, outcome: Outcome, table: UserTable) -> BatchRows:
        """Everything that a micro-batch changes, as memory is now."""
        rows = BatchRows.of(outcome, table, self._horizons, recorded_at=time.time())
        mark_saved(outcome.statistics)
        return rows

    def write(self, rows: BatchRows) -> None:
        """Begin to commit the rows of a micro-batch, in another thread; what was begun before must be settled.

        Until it is settled, only users that are not in memory may be read: anything else may be about to change.
        """
        self._written = self._thread.submit(self._commit, rows)

    def settle(self) -> float | None:
        """Wait for the batch that was begun: when it was committed, in Unix seconds; None if there is none.

        Raises what it failed by: Fenced when a position was not where the batch starts, UserErased when one of its
        users was forgotten meanwhile, StoreUnavailable, RowRefused. Nothing was written then, or the answer was lost.
        """
        written, self._written = self._written, None
        return written.result() if written else None

    def _commit(self, rows: BatchRows) -> float:
        reach("before_transaction")
        with self._writing.transaction() as cursor:
            rows.write(cursor, self._forgotten)
            reach("before_commit")
        reach("after_commit")
        return time.time()

    def activate(
        self,
        positions: Mapping[int, int],
        statistics: Mapping[int, ItemStatistics],
        popular: Mapping[int, Lists],
        *,
        topic: str,
        version: int,
        snapshot: int,
    ) -> None:
        """Record from which offset of each partition a version and a snapshot hold, with its list for new users."""
        with self.transaction() as cursor:
            move_positions(cursor, [Advance(topic, partition, at, at) for partition, at in positions.items()])
            for partition, offset in positions.items():
                row = {"topic": topic, "partition": partition, "offset": offset}
                cursor.execute(RECORD_ACTIVATION, {**row, "kind": "meta_version", "value": version})
                cursor.execute(RECORD_ACTIVATION, {**row, "kind": "catalogue", "value": snapshot})
            execute(cursor, [*statistics_rows(topic, statistics), *pair_rows(topic, statistics)])
            execute(cursor, popular_rows(topic, popular, version))
            reach("mid_swap")
        mark_saved(statistics)

    def _load_segments(
        self, cursor: psycopg2.extensions.cursor, table: UserTable, user_ids: list[str], slots: np.ndarray[Any, Any]
    ) -> None:
        slot_of = dict(zip(user_ids, slots.tolist(), strict=True))
        long_ids = [user for user, slot in slot_of.items() if table.num_applied[slot] >= 64]
        if long_ids:
            cursor.execute(LOAD_EVENT_IDS, (long_ids,))
            for user_id, ids, bodies in cursor.fetchall():
                table.restore_ids(slot_of[user_id], ids, bodies)
        long_seen = [user for user, slot in slot_of.items() if table.num_seen[slot] >= 64]
        if long_seen:
            cursor.execute(LOAD_SEEN_ITEMS, (long_seen,))
            for user_id, items in cursor.fetchall():
                table.restore_seen(slot_of[user_id], items)
