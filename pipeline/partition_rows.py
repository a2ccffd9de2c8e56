"""What belongs to a partition: its position with the fates of its events, dead letters, statistics, popular list.

Functions take an open cursor or give statements: the transaction is the caller's. A position is moved by
compare-and-set, so a worker that was frozen or cut off while another took its partitions can change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psycopg2
import psycopg2.extensions
import torch
from psycopg2.extras import execute_values

from pipeline.batching import Advance, DeadLetter
from pipeline.item_statistics import NUM_BUCKETS, ItemStatistics, PairEvents
from pipeline.outcome import Lists
from pipeline.pair_rows import log_row, saved_pairs, snapshot_row
from pipeline.session import Fenced

Statement = tuple[str, tuple[Any, ...]]  # SQL, and what stands for its placeholders

MAX_OFFSET = 2**63 - 1
READ_POSITIONS = "SELECT partition, next_offset FROM innerloop.stream_position WHERE topic = %s AND partition = ANY(%s)"
INSERT_POSITION = """INSERT INTO innerloop.stream_position (topic, partition, first_offset, next_offset)
    VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING"""
ADVANCE = """UPDATE innerloop.stream_position SET next_offset = %s, applied = applied + %s,
    dead_lettered = dead_lettered + %s, duplicates = duplicates + %s, dropped = dropped + %s, skipped = skipped + %s,
    rate_limited = rate_limited + %s, updated_at = clock_timestamp()
    WHERE topic = %s AND partition = %s AND next_offset = %s"""
ACCEPT_GAP = """UPDATE innerloop.stream_position SET next_offset = %s, skipped = skipped + %s
    WHERE topic = %s AND partition = %s AND next_offset = %s"""
INSERT_DEAD_LETTERS = """INSERT INTO innerloop.dead_letters
    (topic, partition, "offset", reason, detail, key, payload, sha256, record_time) VALUES %s ON CONFLICT DO NOTHING"""
LOAD_STATISTICS = """SELECT partition, epoch_offset, item_nos, counts, pending_buckets, pending_items
    FROM innerloop.item_statistics WHERE topic = %s AND partition = ANY(%s)"""
SAVE_STATISTICS = """INSERT INTO innerloop.item_statistics
    (topic, partition, epoch_offset, item_nos, counts, pending_buckets, pending_items)
    VALUES (%s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (topic, partition) DO UPDATE SET epoch_offset = excluded.epoch_offset, item_nos = excluded.item_nos,
    counts = excluded.counts, pending_buckets = excluded.pending_buckets, pending_items = excluded.pending_items"""
ADD_PENDING = """UPDATE innerloop.item_statistics SET epoch_offset = %s,
    pending_buckets = pending_buckets || %s::smallint[], pending_items = pending_items || %s::integer[]
    WHERE topic = %s AND partition = %s"""
SAVE_PAIRS = """INSERT INTO innerloop.pair_snapshots
    (topic, partition, meta_version, epoch_offset, item_nos, others, counts, scales, users, taken)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (topic, partition) DO UPDATE SET meta_version = excluded.meta_version,
    epoch_offset = excluded.epoch_offset, item_nos = excluded.item_nos, others = excluded.others,
    counts = excluded.counts, scales = excluded.scales, users = excluded.users, taken = excluded.taken"""
LOG_PAIRS = """INSERT INTO innerloop.pair_log (topic, partition, first_offset, items, before)
    VALUES (%s, %s, %s, %s, %s)"""
TRIM_PAIRS = "DELETE FROM innerloop.pair_log WHERE topic = %s AND partition = %s AND first_offset < %s"
LOAD_PAIRS = """SELECT partition, meta_version, item_nos, others, counts, scales, users, taken
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


def move_positions(cursor: psycopg2.extensions.cursor, advances: Iterable[Advance]) -> None:
    """Move each position by compare-and-set; raises Fenced when one is not where it is expected."""
    for move in sorted(advances, key=lambda advance: advance.partition):
        counts = (move.applied, move.dead_lettered, move.duplicates, move.dropped, move.skipped, move.rate_limited)
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


def execute(cursor: psycopg2.extensions.cursor, statements: Iterable[Statement]) -> None:
    """Execute them in their order, with one answer from the server for all."""
    if texts := [cursor.mogrify(statement, values) for statement, values in statements]:
        cursor.execute(b";".join(texts))


def popular_rows(topic: str, popular: Mapping[int, Lists], version: int) -> Iterator[Statement]:
    """Write the lists for users without events."""
    for partition, lists in popular.items():
        num = int(lists.lengths[0]) if len(lists.lengths) else 0
        items, scores = (lists.item_nos[0, :num].tolist(), lists.scores[0, :num].tolist()) if num else ([], [])
        yield SAVE_POPULAR, (topic, partition, _array(items), _array(scores), version)


def statistics_rows(topic: str, statistics: Mapping[int, ItemStatistics]) -> Iterator[Statement]:
    """Write item statistics: all counts once an epoch, what has been added since then otherwise."""
    for partition, held in statistics.items():
        first = 0 if held.unsaved else held.num_saved
        pending = _array(held.pending_buckets[first:]), _array(held.pending_items[first:])
        if not held.unsaved:
            yield ADD_PENDING, (held.epoch_offset, *pending, topic, partition)
            continue
        counts = held.counts.numpy()
        used = np.flatnonzero(counts.any(0))
        packed = psycopg2.Binary(np.ascontiguousarray(counts[:, used]).astype("<f4").tobytes())
        yield SAVE_STATISTICS, (topic, partition, held.epoch_offset, _array(used.tolist()), packed, *pending)


def load_statistics(
    cursor: psycopg2.extensions.cursor, topic: str, partitions: Sequence[int], half_life: float
) -> dict[int, ItemStatistics]:
    """Item statistics of those partitions that have some, with the pairs that were saved."""
    cursor.execute(LOAD_STATISTICS, (topic, list(partitions)))
    found = {row[0]: _statistics_of(row[1:], half_life) for row in cursor.fetchall()}
    for partition, statistics in found.items():
        cursor.execute(LOAD_PAIRS, (topic, partition))
        if snapshot := cursor.fetchone():
            cursor.execute(LOAD_PAIR_LOG, (topic, partition))
            statistics.saved_pairs = saved_pairs(snapshot, cursor.fetchall())
    return found


def pair_log_rows(topic: str, found: Iterable[PairEvents]) -> Iterator[Statement]:
    """Keep what pairs have to count, until a snapshot contains it."""
    for events in found:
        yield LOG_PAIRS, (topic, events.partition, *log_row(events))


def pair_rows(topic: str, statistics: Mapping[int, ItemStatistics]) -> Iterator[Statement]:
    """Write the snapshots that are due, and take away what they contain of the log."""
    for partition, held in statistics.items():
        if held.pairs and held.pairs.snapshot_due:
            item_nos, *columns = snapshot_row(held.pairs)
            packed = (psycopg2.Binary(column) for column in columns)
            yield SAVE_PAIRS, (topic, partition, held.pairs.version, held.pair_epoch_offset, _array(item_nos), *packed)
            # Events that are pending stay; a version's first snapshot follows none.
            kept = held.pairs.pending[0].first_offset if held.pairs.pending else MAX_OFFSET
            yield TRIM_PAIRS, (topic, partition, kept)


def mark_saved(statistics: Mapping[int, ItemStatistics]) -> None:
    """Say that what was changed is on its way; should it not arrive, statistics are read again."""
    for held in statistics.values():
        held.unsaved, held.num_saved = False, len(held.pending_items)
        if held.pairs and held.pairs.snapshot_due:
            held.pairs.snapshot_due, held.pairs.epochs = False, 0


def _statistics_of(row: tuple[Any, ...], half_life: float) -> ItemStatistics:
    """Item statistics from a row of LOAD_STATISTICS, its partition aside."""
    epoch_offset, item_nos, counts, buckets, items = row
    stored = np.frombuffer(counts, "<f4").reshape(-1, len(item_nos)) if item_nos else np.zeros((NUM_BUCKETS, 0), "<f4")
    dense = torch.zeros(NUM_BUCKETS, max(item_nos, default=0) + 1)
    dense[:, item_nos] = torch.from_numpy(stored.copy())
    return ItemStatistics(
        epoch_offset, dense, half_life, list(buckets), list(items), unsaved=False, num_saved=len(items)
    )


def _array(numbers: Sequence[float]) -> str:
    """An array literal; psycopg2 would adapt a list number by number, in five times the time."""
    return "{" + ",".join(map(repr, numbers)) + "}"
