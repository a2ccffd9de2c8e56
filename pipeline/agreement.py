"""Workers of one database write the same rows: one whose settings would have it write others does not start.

A worker holds a shared advisory lock on the fingerprint of its settings for as long as it is connected; PostgreSQL
lets go of it with the connection, however the worker ended. A lock on another fingerprint is somebody who differs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import psycopg2
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from pipeline.session import StoreUnavailable
from schemas.errors import ConfigurationError

# Settings that decide what is written; the others say where things are and how fast they go.
DECIDING = (
    "group", "topic_interactions", "topic_items", "topic_erasures", "partitions", "support_size", "seen_items",
    "dedup_events", "top_n", "user_events_per_minute", "recommend_seen", "event_types", "encoder",
)  # fmt: skip

LOCKS = 0x1A9C_0009  # the first half of the locks' keys, the second is the fingerprint
ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(%s, 0)"
HELD = """SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND objsubid = 2
    AND objid <> 0 AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
HOLD = "SELECT pg_advisory_lock_shared(%s, %s)"
SAVE = "INSERT INTO innerloop.worker_settings (fingerprint, settings) VALUES (%s, %s) ON CONFLICT DO NOTHING"
READ = "SELECT settings FROM innerloop.worker_settings WHERE fingerprint = %s"
LETTING_GO_SECONDS = 3.0  # PostgreSQL may notice a killed worker's end a moment later
# A machine that is gone must not be waited for longer than a minute.
KEEP_ALIVE = "SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"


class SettingsDiffer(ConfigurationError):
    """Another worker runs with other settings: give both the same, or stop the others before a change."""


def deciding(shown: Mapping[str, Any], mapping: Path | None) -> dict[str, Any]:
    """Of all settings those that decide what is written; of a mapping what is in the file."""
    content = mapping.read_text(encoding="utf-8", errors="replace") if mapping else None
    return {name: shown[name] for name in DECIDING} | {"mapping": content}


def fingerprint(settings: Mapping[str, Any]) -> int:
    """A positive 31-bit number, practically as different as the settings are."""
    canonical = json.dumps(settings, sort_keys=True).encode()
    return int.from_bytes(blake2b(canonical, digest_size=4).digest(), "big") % (2**31 - 1) + 1


class Agreement:
    """A worker's part in it: to be held before anything is read, and looked after while it works."""

    def __init__(self, engine: Engine, settings: Mapping[str, Any]) -> None:
        """Nothing is connected yet."""
        self._engine, self._settings = engine, dict(settings)
        self._fingerprint = fingerprint(self._settings)
        self._connection: Any = None

    def hold(self) -> None:
        """Hold the lock, again where the connection has been lost.

        Raises:
            SettingsDiffer: a worker that runs has others.
            StoreUnavailable: try again.

        """
        try:
            if self._connection is None:
                self._connection = self._engine.raw_connection()
                self._execute(KEEP_ALIVE)
                self._take(time.monotonic() + LETTING_GO_SECONDS)
            else:
                self._execute("SELECT 1")
        except (psycopg2.OperationalError, psycopg2.InterfaceError, DBAPIError) as lost:
            self.close()
            raise StoreUnavailable(str(lost).strip().split("\n")[0]) from lost
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()

    def _take(self, until: float) -> None:
        self._connection.cursor().execute(ONE_AT_A_TIME, (LOCKS,))  # until the COMMIT below
        others = {number for (number,) in self._rows(HELD, (LOCKS,))} - {self._fingerprint}
        if others and time.monotonic() < until:
            self._connection.rollback()
            time.sleep(0.2)
            return self._take(until)
        if others:
            raise SettingsDiffer(self._difference(others.pop()))
        cursor = self._connection.cursor()
        cursor.execute(HOLD, (LOCKS, self._fingerprint))
        cursor.execute(SAVE, (self._fingerprint, json.dumps(self._settings)))
        self._connection.commit()

    def _difference(self, other: int) -> str:
        found = self._rows(READ, (other,))
        theirs = found[0][0] if found else {}
        names = [name for name in self._settings if theirs.get(name) != self._settings[name]]
        shown = ", ".join(f"INNERLOOP_{name.upper()}{self._values(name, theirs)}" for name in names)
        return (
            f"a worker on this database runs with other settings ({shown}): give all workers the same, or stop those "
            "that run before this one starts"
        )

    def _values(self, name: str, theirs: Mapping[str, Any]) -> str:
        mine, others = (json.dumps(values.get(name)) for values in (self._settings, theirs))
        return "" if max(len(mine), len(others)) > 40 else f": {others} there, {mine} here"

    def _execute(self, statement: str) -> None:
        self._connection.cursor().execute(statement)
        self._connection.commit()

    def _rows(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        cursor = self._connection.cursor()
        cursor.execute(statement, values)
        found: list[tuple[Any, ...]] = cursor.fetchall()
        return found
