"""The monitor's rows: the record read exactly once, its state and findings written in the same transaction.

The connection that holds the advisory lock is the one that writes, so whoever lost the lock cannot write any more.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psycopg2
from sqlalchemy import Engine

from pipeline.drift import Alarm, Observations
from pipeline.drift_decision import Decision
from pipeline.session import Session
from schemas.event_types import NAMES

MOST_ROWS = 500  # micro-batches of a partition that are read at once

# All that one tick reads is of one moment: positions, record and counters agree.
ONE_SNAPSHOT = "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ"
TRY_LOCK = "SELECT pg_try_advisory_lock(%s)"
LIVE = "SELECT version FROM innerloop.meta_versions WHERE status = 'live'"
# A partition that was never read: what it has applied less what its rows say is what was trimmed before.
BEGIN = """INSERT INTO innerloop.drift_positions (topic, partition, next_offset, applied)
    SELECT s.topic, s.partition, s.first_offset, s.applied - coalesce((
        SELECT sum(n) FROM innerloop.prequential p, unnest(p.applied_types) AS n
        WHERE p.topic = s.topic AND p.partition = s.partition), 0)
    FROM innerloop.stream_position s WHERE s.topic = %s ON CONFLICT DO NOTHING"""
COLUMNS = (
    "p.partition, p.first_offset, p.next_offset, p.meta_version, p.offsets, p.record_times, p.user_ids, p.item_nos, "
    "p.types, p.num_events, p.loss_adapted, p.loss_start, p.rank_adapted, p.event_times, p.new_items, p.scenes, "
    "p.scene_names, p.applied_types"
)
READ = f"""SELECT {COLUMNS} FROM innerloop.drift_positions d CROSS JOIN LATERAL (
        SELECT *, max(p.recorded_at) OVER (ORDER BY p.first_offset) AS latest FROM innerloop.prequential p
        WHERE p.topic = d.topic AND p.partition = d.partition AND p.first_offset >= d.next_offset
        ORDER BY p.first_offset LIMIT %s) AS p
    WHERE d.topic = %s ORDER BY p.latest, p.partition, p.first_offset"""  # noqa: S608 - constant column names
READ_SINCE = f"""SELECT {COLUMNS} FROM innerloop.prequential p
    JOIN unnest(%s::int[], %s::bigint[]) AS since (partition, "offset")
        ON p.partition = since.partition AND p.next_offset > since."offset"
    WHERE p.topic = %s AND p.meta_version = %s
    ORDER BY p.recorded_at DESC LIMIT %s"""  # noqa: S608 - constant column names
MOVE = """UPDATE innerloop.drift_positions SET next_offset = %s, applied = applied + %s
    WHERE topic = %s AND partition = %s AND next_offset = %s"""
POSITIONS = "SELECT partition, next_offset FROM innerloop.drift_positions WHERE topic = %s"
STREAM_POSITIONS = "SELECT partition, next_offset FROM innerloop.stream_position WHERE topic = %s"
UNREAD = """SELECT coalesce(sum(s.applied - d.applied), 0)::bigint FROM innerloop.stream_position s
    JOIN innerloop.drift_positions d USING (topic, partition) WHERE s.topic = %s"""
LOAD_STATE = "SELECT name, numbers, inputs FROM innerloop.drift_state WHERE topic = %s"
SAVE_STATE = """INSERT INTO innerloop.drift_state (topic, name, numbers, inputs) VALUES (%s, %s, %s, %s)
    ON CONFLICT (topic, name) DO UPDATE SET numbers = excluded.numbers, inputs = excluded.inputs"""
DROP_STATE = "DELETE FROM innerloop.drift_state WHERE topic = %s AND NOT name = ANY(%s)"
SAVE_MONITOR = """INSERT INTO innerloop.drift_monitors
    (topic, holder, meta_version, labels, blind, case_series, inputs) VALUES (%s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (topic) DO UPDATE SET holder = excluded.holder, meta_version = excluded.meta_version,
    labels = excluded.labels, blind = excluded.blind, case_series = excluded.case_series, inputs = excluded.inputs,
    seen_at = clock_timestamp(), ready_at = CASE WHEN drift_monitors.holder = excluded.holder
        THEN drift_monitors.ready_at ELSE clock_timestamp() END"""
INSERT_ALARM = """INSERT INTO innerloop.drift_alarms
    (topic, record_time, meta_version, series, label, mean_before, mean_after, worse)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"""
INSERT_DECISION = """INSERT INTO innerloop.drift_decisions
    (topic, record_time, meta_version, verdict, reason, inputs, thresholds) VALUES (%s, %s, %s, %s, %s, %s, %s)
    RETURNING decision"""
INSERT_REQUEST = """INSERT INTO innerloop.retrain_requests (reason, decision, window_from_ms, window_to_ms)
    VALUES (%s, %s, %s, %s)"""
FROZEN = "SELECT reason FROM innerloop.drift_freezes WHERE until_at IS NULL"
BUSY = """SELECT format('request %s is %s', request, status) FROM innerloop.retrain_requests
        WHERE status IN ('pending', 'leased')
    UNION ALL SELECT format('version %s is a %s', version, status) FROM innerloop.meta_versions
        WHERE status = 'canary' OR (status = 'challenger' AND request IS NOT NULL) LIMIT 1"""
RETRAINED = """SELECT record_time, (inputs->>'label')::bigint FROM innerloop.drift_decisions
    WHERE topic = %s AND verdict = 'retrain' ORDER BY decision DESC LIMIT 100"""
OUTCOMES = """SELECT coalesce(v.status, r.status) FROM innerloop.retrain_requests r
    LEFT JOIN innerloop.meta_versions v ON v.version = r.version
    WHERE r.status IN ('done', 'failed') ORDER BY r.request DESC LIMIT 20"""
LETTERS = """SELECT sum(dead_lettered)::float8, sum(next_offset - first_offset)::float8
    FROM innerloop.stream_position WHERE topic = %s"""
TRIM = "SELECT innerloop.trim_prequential(%s, now() - make_interval(secs => 3600 * %s), %s)"


@dataclass(frozen=True)
class Piece:
    """One row of the record, with its E labels that have a loss as columns.

    `offsets` and `record_times` [E] are Kafka's of the labels; `record_ms` is its newest time in the row.
    """

    partition: int
    next_offset: int
    version: int
    observations: Observations
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    record_times: np.ndarray[Any, np.dtype[np.int64]]
    record_ms: int
    applied_types: np.ndarray[Any, np.dtype[np.int64]]

    def since(self, offset: int) -> Piece:
        """The labels from an offset on."""
        kept = self.offsets >= offset
        return replace(
            self,
            observations=self.observations.at(kept),
            offsets=self.offsets[kept],
            record_times=self.record_times[kept],
        )


class DriftStore:
    """One connection, which holds the topic's lock while it lives: after StoreUnavailable the state is loaded again."""

    def __init__(self, engine: Engine, topic: str) -> None:
        self._session, self.topic = Session(engine, prepare=ONE_SNAPSHOT), topic
        self._key = int.from_bytes(
            hashlib.blake2b(f"drift:{topic}".encode(), digest_size=8).digest(), "big", signed=True
        )

    def acquire(self) -> bool:
        """Try to become the topic's one monitor; False while another is."""
        with self.transaction() as cursor:
            cursor.execute(TRY_LOCK, (self._key,))
            held = bool(cursor.fetchone()[0])
        if not held:
            self.close()
        return held

    def transaction(self) -> AbstractContextManager[Any]:
        """One transaction on one snapshot. Raises StoreUnavailable."""
        return self._session.transaction()

    def close(self) -> None:
        """Drop the connection, and with it the lock and any open transaction."""
        self._session.close()

    def read(self, cursor: Any) -> list[Piece]:
        """Take the next rows of every partition, in the order of their recording, and move the positions past them."""
        cursor.execute(BEGIN, (self.topic,))
        cursor.execute(READ, (MOST_ROWS, self.topic))
        rows = cursor.fetchall()
        cursor.execute(POSITIONS, (self.topic,))
        at = dict(cursor.fetchall())
        moves: dict[int, tuple[int, int]] = {}
        for row in rows:
            _, applied = moves.get(row[0], (0, 0))
            moves[row[0]] = row[2], applied + sum(row[17])
        for partition, (next_offset, applied) in moves.items():
            cursor.execute(MOVE, (next_offset, applied, self.topic, partition, at[partition]))
        return list(map(piece, rows))

    def read_since(self, cursor: Any, positions: dict[int, int], version: int, most: int) -> list[Piece]:
        """The newest `most` micro-batches of one version, oldest first; their labels from these offsets on."""
        offsets = list(positions), list(positions.values())
        cursor.execute(READ_SINCE, (*offsets, self.topic, version, most))
        found = map(piece, cursor.fetchall()[::-1])
        return [one.since(positions[one.partition]) for one in found]

    def positions(self, cursor: Any) -> dict[int, int]:
        """Next offset to read, by partition."""
        cursor.execute(POSITIONS, (self.topic,))
        return dict(cursor.fetchall())

    def stream_positions(self, cursor: Any) -> dict[int, int]:
        """Next offset to be applied by a worker, by partition."""
        cursor.execute(STREAM_POSITIONS, (self.topic,))
        return dict(cursor.fetchall())

    def load(self, cursor: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What `save` wrote: numbers ({} before the first time) and detectors' inputs."""
        cursor.execute(LOAD_STATE, (self.topic,))
        rows = {name: (numbers, bytes(inputs)) for name, numbers, inputs in cursor.fetchall()}
        numbers, _ = rows.pop("monitor", ({}, b""))
        return numbers, {name: inputs for name, (_, inputs) in rows.items()}

    def save(self, cursor: Any, numbers: str, changed: dict[str, bytes], series: list[str]) -> None:
        """Write the numbers (JSON) and the detectors that have changed; forget those that are not in `series`."""
        cursor.execute(SAVE_STATE, (self.topic, "monitor", numbers, b""))
        for name, inputs in changed.items():
            cursor.execute(SAVE_STATE, (self.topic, name, "{}", psycopg2.Binary(inputs)))
        cursor.execute(DROP_STATE, (self.topic, ["monitor", *series]))

    def note_alarms(self, cursor: Any, alarms: list[Alarm], record_ms: int, version: int | None) -> None:
        """Keep what the detectors found."""
        for alarm in alarms:
            row = (alarm.series, alarm.at, alarm.before, alarm.after, alarm.worse)
            cursor.execute(INSERT_ALARM, (self.topic, record_ms, version, *row))

    def note_decision(
        self, cursor: Any, decision: Decision, window: tuple[int, int], version: int | None, found: dict[str, Any]
    ) -> None:
        """Keep a verdict with its `inputs` and `thresholds`; `retrain` asks a trainer, in the same transaction."""
        from_ms, to_ms = window
        inputs, thresholds = json.dumps(found["inputs"]), json.dumps(found["thresholds"])
        row = (self.topic, to_ms, version, decision.verdict, decision.reason, inputs, thresholds)
        cursor.execute(INSERT_DECISION, row)
        number = cursor.fetchone()[0]
        if decision.verdict == "retrain":
            cursor.execute(INSERT_REQUEST, (decision.reason, number, min(from_ms, to_ms), to_ms + 1))

    def circumstances(self, cursor: Any, *, record_ms: int, label: int) -> dict[str, Any]:
        """What rows say of earlier retrainings and of operators, as fields of `Circumstances`."""
        cursor.execute(FROZEN)
        frozen = cursor.fetchone()
        cursor.execute(BUSY)
        busy = cursor.fetchone()
        cursor.execute(RETRAINED, (self.topic,))
        past = cursor.fetchall()
        cursor.execute(OUTCOMES)
        outcomes = [row[0] for row in cursor.fetchall()]
        bad = [outcome in ("rejected", "failed") for outcome in outcomes]
        return {
            "frozen": frozen[0] if frozen else "",
            "busy": busy[0] if busy else "",
            "seconds_since": (record_ms - past[0][0]) / 1000 if past else None,
            "labels_since": label - past[0][1] if past else None,
            "retrained_today": sum(record_ms - at < 86_400_000 for at, _ in past),
            "rejected": bad.index(False) if False in bad else len(bad),
        }

    def letters(self, cursor: Any) -> tuple[float, float]:
        """(dead letters, offsets passed) of the topic since its beginning."""
        cursor.execute(LETTERS, (self.topic,))
        dead, passed = cursor.fetchone()
        return dead or 0.0, passed or 0.0

    def live(self, cursor: Any) -> int | None:
        """The live version."""
        cursor.execute(LIVE)
        row = cursor.fetchone()
        return row[0] if row else None

    def unread(self, cursor: Any) -> int:
        """Applied events that were not read; on one snapshot, after everything was read, events without a record."""
        cursor.execute(UNREAD, (self.topic,))
        return int(cursor.fetchone()[0])

    def note_alive(self, cursor: Any, holder: str, row: tuple[int | None, int, str, str | None], mix: Any) -> None:
        """Say that the topic is watched: version, labels, why it is blind (or ""), series of the open case."""
        cursor.execute(SAVE_MONITOR, (self.topic, holder, *row, json.dumps(mix)))

    def trim(self, cursor: Any, hours: float, most: int) -> int:
        """Add micro-batches older than this to their hours and remove them; gives how many."""
        cursor.execute(TRIM, (self.topic, hours, most))
        return int(cursor.fetchone()[0])


def piece(row: tuple[Any, ...]) -> Piece:
    """A row in the order of COLUMNS; labels without a vector have no loss and are left out."""
    partition, _, next_offset, version, offsets, record_times, users, items, types, num_events, loss, start, ranks = (
        row[:13]
    )
    event_times, new_items, scenes, names, counts = row[13:]
    seen = Observations(
        loss=np.array(loss, float),
        start=np.array(start, float),
        event_ms=np.array(event_times, np.int64),
        num_events=np.array(num_events, np.int64),
        types=np.array(types, np.int64),
        new_items=np.array(new_items, bool),
        scenes=np.array([names[place - 1] if place else "" for place in scenes], np.str_),
        users=np.array(list(map(_hash, users)), np.int64),
        items=np.array(items, np.int64),
    )
    known = np.array(ranks, np.int64) > 0
    return Piece(
        partition=partition,
        next_offset=next_offset,
        version=version,
        observations=seen.at(known),
        offsets=np.array(offsets, np.int64)[known],
        record_times=np.array(record_times, np.int64)[known],
        record_ms=max(record_times, default=0),
        applied_types=np.array(counts or [0] * len(NAMES)),
    )


def _hash(user: str) -> int:
    return int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest(), "little", signed=True)
