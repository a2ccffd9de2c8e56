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

from sqlalchemy import Engine

from pipeline.session import Session
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
MINE = """SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND objid::bigint = %s AND objsubid = 2
    AND granted AND pid = pg_backend_pid()"""
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
        self._session, self._settings = Session(engine, prepare=KEEP_ALIVE), dict(settings)
        self._fingerprint = fingerprint(self._settings)

    def hold(self) -> None:
        """Hold the lock, again where the connection has been lost.

        Raises:
            SettingsDiffer: a worker that runs has others.
            StoreUnavailable: try again.

        """
        until = time.monotonic() + LETTING_GO_SECONDS
        while not self._taken(last=time.monotonic() >= until):
            time.sleep(0.2)

    def close(self) -> None:
        """Let go."""
        self._session.close()

    def _taken(self, *, last: bool) -> bool:
        """Take the lock, if this connection does not have it; False where others still hold theirs."""
        with self._session.transaction() as cursor:
            cursor.execute(MINE, (LOCKS, self._fingerprint))
            if cursor.fetchone():
                return True
            cursor.execute(ONE_AT_A_TIME, (LOCKS,))  # until the COMMIT
            cursor.execute(HELD, (LOCKS,))
            others = {number for (number,) in cursor.fetchall()} - {self._fingerprint}
            if others and last:
                cursor.execute(READ, (others.pop(),))
                found = cursor.fetchone()
                raise SettingsDiffer(self._difference(found[0] if found else {}))
            if not others:
                cursor.execute(HOLD, (LOCKS, self._fingerprint))
                cursor.execute(SAVE, (self._fingerprint, json.dumps(self._settings)))
        return not others

    def _difference(self, theirs: Mapping[str, Any]) -> str:
        names = [name for name in self._settings if theirs.get(name) != self._settings[name]]
        shown = ", ".join(f"INNERLOOP_{name.upper()}{self._values(name, theirs)}" for name in names)
        return (
            f"a worker on this database runs with other settings ({shown}): give all workers the same, or stop those "
            "that run before this one starts"
        )

    def _values(self, name: str, theirs: Mapping[str, Any]) -> str:
        mine, others = (json.dumps(values.get(name)) for values in (self._settings, theirs))
        return "" if max(len(mine), len(others)) > 40 else f": {others} there, {mine} here"
