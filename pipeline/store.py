"""Postgres as the truth: read positions, users and catalogue; write a micro-batch in one transaction.

Every statement stands as SQL with a name, here or in `partition_rows`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg2.extensions
from sqlalchemy import Engine

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
    load_statistics,
    log_pairs,
    mark_saved,
    move_positions,
    write_dead_letters,
    write_pairs,
    write_popular,
    write_statistics,
)
from pipeline.session import Fenced, Session
from pipeline.support import UserTable
from pipeline.user_rows import prequential_copy, segments_copy, states_copy

# What is copied comes into tables of the session first: a client that stops amid a COPY cannot be timed out by the
# server, and must not hold a lock on what others write meanwhile. The raised toast target is that of `user_state`: LIKE
# does not copy it, and without it every row of 2 to 4 kB is compressed on its way.
INCOMING = "".join(
    f"CREATE TEMPORARY TABLE IF NOT EXISTS incoming_{name} "
    f"(LIKE innerloop.{name} INCLUDING DEFAULTS) WITH (toast_tuple_target = 8160) ON COMMIT DELETE ROWS;"
    for name in ("user_state", "event_ids", "seen_items", "prequential")
)
STATE_COLUMNS = (
    "user_id", "partition", "last_offset", "num_events", "num_applied", "support_items", "support_types", "adapter",
    "track", "adapter_events", "adapter_use", "meta_version", "top_items", "top_scores", "recent_ids", "recent_bodies",
    "recent_seen", "num_seen", "due_us",
)  # fmt: skip
COPY_USERS = f"COPY incoming_user_state ({', '.join(STATE_COLUMNS)}) FROM STDIN (FORMAT binary)"
# In one order of users everywhere, so that two transactions cannot wait for each other.
MERGE_USERS = f"""INSERT INTO innerloop.user_state ({", ".join(STATE_COLUMNS)}, updated_at)
    SELECT {", ".join(STATE_COLUMNS)}, clock_timestamp() FROM incoming_user_state ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in STATE_COLUMNS[1:])}, updated_at = excluded.updated_at
    WHERE user_state.partition = excluded.partition"""  # noqa: S608 - constant column names
COPY_EVENT_IDS = "COPY incoming_event_ids (user_id, segment, ids, bodies) FROM STDIN (FORMAT binary)"
COPY_SEEN_ITEMS = "COPY incoming_seen_items (user_id, segment, items) FROM STDIN (FORMAT binary)"
TAKE_EVENT_IDS = "INSERT INTO innerloop.event_ids SELECT * FROM incoming_event_ids"
TAKE_SEEN_ITEMS = "INSERT INTO innerloop.seen_items SELECT * FROM incoming_seen_items"
TRIM_EVENT_IDS = """DELETE FROM innerloop.event_ids e USING unnest(%s::text[], %s::int[]) AS t (user_id, segment)
    WHERE e.user_id = t.user_id AND e.segment <= t.segment"""
TRIM_SEEN_ITEMS = """DELETE FROM innerloop.seen_items s USING unnest(%s::text[], %s::int[]) AS t (user_id, segment)
    WHERE s.user_id = t.user_id AND s.segment <= t.segment"""
COPY_PREQUENTIAL = """COPY incoming_prequential
    (topic, partition, first_offset, next_offset, recorded_at, meta_version, offsets, record_times, user_ids, item_nos,
    types, num_events, loss_adapted, loss_start, rank_adapted, rank_start, rank_popular, event_times, new_items, scenes,
    scene_names, applied_types) FROM STDIN (FORMAT binary)"""
TAKE_PREQUENTIAL = "INSERT INTO innerloop.prequential SELECT * FROM incoming_prequential"
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
    """One connection to the database, opened when needed; not shared between threads."""

    def __init__(self, engine: Engine, *, id_horizon: int, seen_horizon: int) -> None:
        self._session = Session(engine, prepare=INCOMING)
        self._horizons = id_horizon, seen_horizon
        self._forgotten = Forgotten()

    def transaction(self) -> AbstractContextManager[psycopg2.extensions.cursor]:
        """One transaction, committed at the end of the block. Passing failures become StoreUnavailable."""
        return self._session.transaction()

    def close(self) -> None:
        """Drop the connection, and with it any open transaction."""
        self._session.close()

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

    def write(self, outcome: Outcome, table: UserTable) -> None:
        """Commit everything that a micro-batch changes.

        Raises Fenced when a position is not where the batch starts, UserErased when one of its users was forgotten
        meanwhile; nothing is written then.
        """
        topic = outcome.batch.advances[0].topic
        reach("before_transaction")
        with self.transaction() as cursor:
            _copy_in(cursor, outcome, table)
            move_positions(cursor, outcome.batch.advances)
            self._forgotten.refuse(cursor, outcome.batch.users)
            write_dead_letters(cursor, outcome.batch.dead_letters)
            if len(outcome.slots):
                cursor.execute(MERGE_USERS)
                if cursor.rowcount != len(outcome.slots):
                    raise Fenced("a user of this batch was written in another partition meanwhile")
            self._take_segments(cursor, outcome)
            write_statistics(cursor, topic, outcome.statistics)
            log_pairs(cursor, topic, outcome.pair_events)
            write_pairs(cursor, topic, outcome.statistics)
            write_popular(cursor, topic, outcome.popular, outcome.version)
            if outcome.prequential.applied_types:
                cursor.execute(TAKE_PREQUENTIAL)
            reach("before_commit")
        reach("after_commit")
        mark_saved(outcome.statistics)

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
            write_statistics(cursor, topic, statistics)
            write_pairs(cursor, topic, statistics)
            write_popular(cursor, topic, popular, version)
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

    def _take_segments(self, cursor: psycopg2.extensions.cursor, outcome: Outcome) -> None:
        for segments, take, trim, horizon in (
            (outcome.id_segments, TAKE_EVENT_IDS, TRIM_EVENT_IDS, self._horizons[0]),
            (outcome.seen_segments, TAKE_SEEN_ITEMS, TRIM_SEEN_ITEMS, self._horizons[1]),
        ):
            if segments.user_ids:
                cursor.execute(take)
                cursor.execute(trim, (segments.user_ids, segments.expired(horizon)))


def _copy_in(cursor: psycopg2.extensions.cursor, outcome: Outcome, table: UserTable) -> None:
    """Copy what is large into the session's own tables; nothing that others wait for is locked yet."""
    if len(outcome.slots):
        cursor.copy_expert(COPY_USERS, states_copy(outcome, table))
    for copy, segments in ((COPY_EVENT_IDS, outcome.id_segments), (COPY_SEEN_ITEMS, outcome.seen_segments)):
        if segments.user_ids:
            cursor.copy_expert(copy, segments_copy(segments))
    if outcome.prequential.applied_types:
        cursor.copy_expert(COPY_PREQUENTIAL, prequential_copy(outcome, recorded_at=time.time()))
