"""Postgres as the truth: read positions, users and catalogue; write a micro-batch in one transaction.

Every statement stands here as SQL with a name. A position is moved by compare-and-set, so a worker that was frozen or
cut off while another took its partitions can change nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg2
import psycopg2.extensions
import torch
from psycopg2.extras import execute_values
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from pipeline.batching import Advance, DeadLetter
from pipeline.failpoints import reach
from pipeline.item_statistics import NUM_BUCKETS, ItemStatistics
from pipeline.outcome import Lists, Outcome
from pipeline.pair_rows import log_row, saved_pairs, snapshot_row
from pipeline.support import UserTable
from pipeline.user_rows import prequential_copy, segments_copy, states_copy

# Failures that pass: waiting and trying again is right, a dead letter never is.
_PASSING_CODES = {
    "40001", "40P01", "55P03", "57014", "57P01", "57P02", "57P03", "25006", "25P03", "53100", "53200", "53300", "53400",
}  # fmt: skip
MAX_OFFSET = 2**63 - 1
# A stopped process must not keep its row locks; a waiting one must not wait for ever.
SESSION = "-c idle_in_transaction_session_timeout=3000 -c lock_timeout=2000"

READ_POSITIONS = "SELECT partition, next_offset FROM innerloop.stream_position WHERE topic = %s AND partition = ANY(%s)"
INSERT_POSITION = """INSERT INTO innerloop.stream_position (topic, partition, first_offset, next_offset)
    VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING"""
ADVANCE = """UPDATE innerloop.stream_position SET next_offset = %s, applied = applied + %s,
    dead_lettered = dead_lettered + %s, duplicates = duplicates + %s, dropped = dropped + %s, skipped = skipped + %s,
    updated_at = clock_timestamp() WHERE topic = %s AND partition = %s AND next_offset = %s"""
ACCEPT_GAP = """UPDATE innerloop.stream_position SET next_offset = %s, skipped = skipped + %s
    WHERE topic = %s AND partition = %s AND next_offset = %s"""
INSERT_DEAD_LETTERS = """INSERT INTO innerloop.dead_letters
    (topic, partition, "offset", reason, detail, key, payload, sha256, record_time) VALUES %s ON CONFLICT DO NOTHING"""
# What is copied comes into tables of the session first: a client that stops amid a COPY cannot be timed out by the
# server, and must not hold a lock on what others write meanwhile.
INCOMING = "".join(
    f"CREATE TEMPORARY TABLE IF NOT EXISTS incoming_{name} "
    f"(LIKE innerloop.{name} INCLUDING DEFAULTS) ON COMMIT DELETE ROWS;"
    for name in ("user_state", "event_ids", "seen_items", "prequential")
)
STATE_COLUMNS = (
    "user_id", "partition", "last_offset", "num_events", "num_applied", "support_items", "support_types", "adapter",
    "track", "adapter_events", "adapter_use", "meta_version", "top_items", "top_scores", "recent_ids", "recent_bodies",
    "recent_seen", "num_seen",
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
    track, adapter_events, meta_version, recent_ids, recent_bodies, recent_seen, num_seen
    FROM innerloop.user_state WHERE user_id = ANY(%s)"""
LOAD_EVENT_IDS = """SELECT user_id, ids, bodies FROM innerloop.event_ids
    WHERE user_id = ANY(%s) ORDER BY user_id, segment"""
LOAD_SEEN_ITEMS = "SELECT user_id, items FROM innerloop.seen_items WHERE user_id = ANY(%s) ORDER BY user_id, segment"
LOAD_STATISTICS = """SELECT partition, epoch_offset, item_nos, counts, pending_buckets, pending_items
    FROM innerloop.item_statistics WHERE topic = %s AND partition = ANY(%s)"""
SAVE_STATISTICS = """INSERT INTO innerloop.item_statistics
    (topic, partition, epoch_offset, item_nos, counts, pending_buckets, pending_items)
    VALUES (%s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (topic, partition) DO UPDATE SET epoch_offset = excluded.epoch_offset, item_nos = excluded.item_nos,
    counts = excluded.counts, pending_buckets = excluded.pending_buckets, pending_items = excluded.pending_items"""
SAVE_PENDING = """UPDATE innerloop.item_statistics SET epoch_offset = %s, pending_buckets = %s, pending_items = %s
    WHERE topic = %s AND partition = %s"""
SAVE_PAIRS = """INSERT INTO innerloop.pair_snapshots
    (topic, partition, meta_version, epoch_offset, item_nos, others, counts, scales, users)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (topic, partition) DO UPDATE SET meta_version = excluded.meta_version,
    epoch_offset = excluded.epoch_offset, item_nos = excluded.item_nos, others = excluded.others,
    counts = excluded.counts, scales = excluded.scales, users = excluded.users"""
LOG_PAIRS = "INSERT INTO innerloop.pair_log (topic, partition, first_offset, items, before) VALUES %s"
TRIM_PAIRS = "DELETE FROM innerloop.pair_log WHERE topic = %s AND partition = %s AND first_offset < %s"
LOAD_PAIRS = """SELECT partition, meta_version, item_nos, others, counts, scales, users
    FROM innerloop.pair_snapshots WHERE topic = %s AND partition = %s"""
LOAD_PAIR_LOG = """SELECT first_offset, items, before FROM innerloop.pair_log
    WHERE topic = %s AND partition = %s ORDER BY first_offset"""
SAVE_POPULAR = """INSERT INTO innerloop.popular_items (topic, partition, item_nos, scores, meta_version, updated_at)
    VALUES (%s, %s, %s, %s, %s, clock_timestamp()) ON CONFLICT (topic, partition) DO UPDATE SET
    item_nos = excluded.item_nos, scores = excluded.scores, meta_version = excluded.meta_version,
    updated_at = excluded.updated_at"""
RECORD_ACTIVATION = """INSERT INTO innerloop.activations (topic, partition, kind, value, from_offset)
    SELECT %(topic)s, %(partition)s, %(kind)s, %(value)s, %(offset)s WHERE %(value)s IS DISTINCT FROM (
        SELECT value FROM innerloop.activations
        WHERE topic = %(topic)s AND partition = %(partition)s AND kind = %(kind)s ORDER BY from_offset DESC LIMIT 1)
    ON CONFLICT (topic, partition, kind, from_offset) DO UPDATE SET value = excluded.value"""
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


class StoreUnavailable(Exception):
    """The database is away, read-only, full or locked: keep the batch, wait, and try again."""


class Fenced(Exception):
    """Another worker has moved the position: forget the partition and stop, the restart reads the truth."""


class Store:
    """One connection to the database, opened when needed; not shared between threads."""

    def __init__(self, engine: Engine, *, id_horizon: int, seen_horizon: int) -> None:
        self._engine = engine
        self._horizons = id_horizon, seen_horizon
        self._connection: Any = None

    @contextmanager
    def transaction(self) -> Iterator[psycopg2.extensions.cursor]:
        """One transaction, committed at the end of the block. Passing failures become StoreUnavailable."""
        try:
            if self._connection is None:
                self._connection = self._open()
            yield self._connection.cursor()
            self._connection.commit()
        except (psycopg2.Error, DBAPIError) as error:
            self.close()
            cause = error.orig if isinstance(error, DBAPIError) else error
            if not isinstance(cause, psycopg2.Error) or not _passes(cause):
                raise
            raise StoreUnavailable(str(cause).strip().split("\n")[0]) from error
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        connection = self._engine.raw_connection()
        connection.cursor().execute(INCOMING)
        connection.commit()
        return connection

    def close(self) -> None:
        """Drop the connection, and with it any open transaction."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()

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

    def load_statistics(self, topic: str, partitions: Iterable[int], half_life: float) -> dict[int, ItemStatistics]:
        """Item statistics of those partitions that have some."""
        with self.transaction() as cursor:
            cursor.execute(LOAD_STATISTICS, (topic, list(partitions)))
            found = {row[0]: _statistics(row[1:], half_life) for row in cursor.fetchall()}
            for partition, statistics in found.items():
                cursor.execute(LOAD_PAIRS, (topic, partition))
                snapshot = cursor.fetchone()
                if snapshot:
                    cursor.execute(LOAD_PAIR_LOG, (topic, partition))
                    statistics.saved_pairs = saved_pairs(snapshot, cursor.fetchall())
            return found

    def write(self, outcome: Outcome, table: UserTable) -> None:
        """Commit everything that a micro-batch changes.

        Raises Fenced when a position is not where the batch starts; nothing is written then.
        """
        topic = outcome.batch.advances[0].topic
        reach("before_transaction")
        with self.transaction() as cursor:
            _copy_in(cursor, outcome, table)
            move_positions(cursor, outcome.batch.advances)
            write_dead_letters(cursor, outcome.batch.dead_letters)
            if len(outcome.slots):
                cursor.execute(MERGE_USERS)
                if cursor.rowcount != len(outcome.slots):
                    raise Fenced("a user of this batch was written in another partition meanwhile")
            self._take_segments(cursor, outcome)
            _write_statistics(cursor, topic, outcome.statistics)
            if outcome.pair_events:
                rows = [(topic, events.partition, *log_row(events)) for events in outcome.pair_events]
                execute_values(cursor, LOG_PAIRS, rows)
            _write_pairs(cursor, topic, outcome.statistics)
            _write_popular(cursor, topic, outcome.popular, outcome.version)
            if outcome.prequential.applied_types:
                cursor.execute(TAKE_PREQUENTIAL)
            reach("before_commit")
        reach("after_commit")
        _mark_saved(outcome.statistics)

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
            _write_statistics(cursor, topic, statistics)
            _write_pairs(cursor, topic, statistics)
            _write_popular(cursor, topic, popular, version)
            reach("mid_swap")
        _mark_saved(statistics)

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


def _passes(error: psycopg2.Error) -> bool:
    return error.pgcode in _PASSING_CODES or isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)


def move_positions(cursor: psycopg2.extensions.cursor, advances: Iterable[Advance]) -> None:
    """Move each position by compare-and-set; raises Fenced when one is not where it is expected."""
    for move in sorted(advances, key=lambda advance: advance.partition):
        counts = (move.applied, move.dead_lettered, move.duplicates, move.dropped, move.skipped)
        cursor.execute(ADVANCE, (move.next_offset, *counts, move.topic, move.partition, move.start))
        if cursor.rowcount != 1:
            raise Fenced(f"{move.topic}[{move.partition}] is no longer at {move.start}")


def write_dead_letters(cursor: psycopg2.extensions.cursor, dead_letters: Sequence[DeadLetter]) -> None:
    """Keep what can never be applied, with its reason and at most 64 KiB of its bytes."""
    if dead_letters:
        execute_values(cursor, INSERT_DEAD_LETTERS, [_dead_letter_row(letter) for letter in dead_letters])


def _dead_letter_row(letter: DeadLetter) -> tuple[Any, ...]:
    payload = letter.payload or b""
    return (
        letter.topic,
        letter.partition,
        letter.offset,
        letter.reason,
        letter.detail[:500],
        None if letter.key is None else psycopg2.Binary(letter.key[:65536]),
        None if letter.payload is None else psycopg2.Binary(payload[:65536]),
        hashlib.sha256(payload).hexdigest(),
        letter.record_ms,
    )


def _write_popular(cursor: psycopg2.extensions.cursor, topic: str, popular: Mapping[int, Lists], version: int) -> None:
    for partition, lists in popular.items():
        num = int(lists.lengths[0]) if len(lists.lengths) else 0
        items, scores = (lists.item_nos[0, :num].tolist(), lists.scores[0, :num].tolist()) if num else ([], [])
        cursor.execute(SAVE_POPULAR, (topic, partition, _array(items), _array(scores), version))


def _write_statistics(cursor: psycopg2.extensions.cursor, topic: str, statistics: Mapping[int, ItemStatistics]) -> None:
    for partition, held in statistics.items():
        pending = _array(held.pending_buckets), _array(held.pending_items)
        if not held.unsaved:
            cursor.execute(SAVE_PENDING, (held.epoch_offset, *pending, topic, partition))
            continue
        counts = held.counts.numpy()
        used = np.flatnonzero(counts.any(0))
        packed = psycopg2.Binary(np.ascontiguousarray(counts[:, used]).astype("<f4").tobytes())
        cursor.execute(SAVE_STATISTICS, (topic, partition, held.epoch_offset, _array(used.tolist()), packed, *pending))


def _write_pairs(cursor: psycopg2.extensions.cursor, topic: str, statistics: Mapping[int, ItemStatistics]) -> None:
    """Write the snapshots that are due, and take away what they contain of the log."""
    for partition, held in statistics.items():
        if held.pairs and held.pairs.snapshot_due:
            item_nos, *columns = snapshot_row(held.pairs.table)
            packed = (psycopg2.Binary(column) for column in columns)
            row = (topic, partition, held.pairs.version, held.epoch_offset, _array(item_nos), *packed)
            cursor.execute(SAVE_PAIRS, row)
            # Events that are pending stay; a version's first snapshot follows none.
            kept = held.pairs.pending[0].first_offset if held.pairs.pending else MAX_OFFSET
            cursor.execute(TRIM_PAIRS, (topic, partition, kept))


def _array(numbers: Sequence[float]) -> str:
    """An array literal; psycopg2 would adapt a list number by number, in five times the time."""
    return "{" + ",".join(map(repr, numbers)) + "}"


def _mark_saved(statistics: Mapping[int, ItemStatistics]) -> None:
    for held in statistics.values():
        held.unsaved = False
        if held.pairs and held.pairs.snapshot_due:
            held.pairs.snapshot_due, held.pairs.epochs = False, 0


def _statistics(row: tuple[Any, ...], half_life: float) -> ItemStatistics:
    epoch_offset, item_nos, counts, buckets, items = row
    stored = np.frombuffer(counts, "<f4").reshape(-1, len(item_nos)) if item_nos else np.zeros((NUM_BUCKETS, 0), "<f4")
    dense = torch.zeros(NUM_BUCKETS, max(item_nos, default=0) + 1)
    dense[:, item_nos] = torch.from_numpy(stored.copy())
    return ItemStatistics(epoch_offset, dense, half_life, list(buckets), list(items), unsaved=False)
