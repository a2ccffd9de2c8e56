"""Requests for a new version, held by lease: one trainer works on one, and another takes over when it dies.

Times are the database's. A trainer that was frozen while its lease ran out finds out when it renews.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Engine, text

LEASE_SECONDS = 30.0  # renewed five times as often; a dead trainer's request is free again after that
ATTEMPTS = 5  # after which a request is given up: what kills every trainer must not kill them for ever

_FREE = """(status = 'pending' OR (status = 'leased' AND leased_until < clock_timestamp()))"""
_GIVE_UP = text(f"""
    UPDATE innerloop.retrain_requests SET status = 'failed', leased_by = NULL, leased_until = NULL,
        finished_at = clock_timestamp(), error = 'given up after ' || attempts || ' attempts, none of which ended'
    WHERE {_FREE} AND attempts >= :attempts""")  # noqa: S608 - a constant
_LEASE = text(f"""
    UPDATE innerloop.retrain_requests SET status = 'leased', leased_by = :owner, attempts = attempts + 1,
        leased_until = clock_timestamp() + :lease
    WHERE request = (SELECT request FROM innerloop.retrain_requests WHERE {_FREE}
        ORDER BY request LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING request, reason, window_from_ms, window_to_ms, attempts""")  # noqa: S608 - a constant
_RENEW = text("""
    UPDATE innerloop.retrain_requests SET leased_until = clock_timestamp() + :lease
    WHERE request = :request AND leased_by = :owner AND status = 'leased'""")
_DONE = text("""
    UPDATE innerloop.retrain_requests SET status = 'done', version = :version, finished_at = clock_timestamp(),
        leased_by = NULL, leased_until = NULL
    WHERE request = :request AND leased_by = :owner AND status = 'leased'""")
_FAILED = text("""
    UPDATE innerloop.retrain_requests SET status = 'failed', error = :error, finished_at = clock_timestamp(),
        leased_by = NULL, leased_until = NULL
    WHERE request = :request AND leased_by = :owner AND status = 'leased'""")
_RELEASE = text("""
    UPDATE innerloop.retrain_requests SET status = 'pending', leased_by = NULL, leased_until = NULL,
        attempts = attempts - 1
    WHERE request = :request AND leased_by = :owner AND status = 'leased'""")


class LeaseLost(Exception):
    """The lease ran out and another trainer may have the request: leave it to that one."""


@dataclass(frozen=True)
class Request:
    """One leased row: learn from the records with Kafka times in [window_from_ms, window_to_ms)."""

    request: int
    reason: str
    window_from_ms: int
    window_to_ms: int
    attempts: int


def lease(engine: Engine, owner: str, *, seconds: float = LEASE_SECONDS, attempts: int = ATTEMPTS) -> Request | None:
    """Take the oldest free request, or None; those that killed too many trainers are given up."""
    with engine.begin() as connection:
        connection.execute(_GIVE_UP, {"attempts": attempts})
        row = connection.execute(_LEASE, {"owner": owner, "lease": timedelta(seconds=seconds)}).one_or_none()
        return None if row is None else Request(*row)


def renew(engine: Engine, request: int, owner: str, *, seconds: float = LEASE_SECONDS) -> None:
    """Hold a request for longer. Raises LeaseLost."""
    with engine.begin() as connection:
        result = connection.execute(_RENEW, {"request": request, "owner": owner, "lease": timedelta(seconds=seconds)})
        _held(result.rowcount, request)


def finish(engine: Engine, request: int, owner: str, version: int) -> None:
    """Say what a request led to. Raises LeaseLost."""
    with engine.begin() as connection:
        _held(connection.execute(_DONE, {"request": request, "owner": owner, "version": version}).rowcount, request)


def fail(engine: Engine, request: int, owner: str, error: str) -> None:
    """Say why a request led to nothing. Raises LeaseLost."""
    with engine.begin() as connection:
        _held(connection.execute(_FAILED, {"request": request, "owner": owner, "error": error}).rowcount, request)


def release(engine: Engine, request: int, owner: str) -> None:
    """Give a request back unfinished; one that was lost meanwhile is no longer ours to give."""
    with engine.begin() as connection:
        connection.execute(_RELEASE, {"request": request, "owner": owner})


def _held(rows: int, request: int) -> None:
    if rows != 1:
        raise LeaseLost(f"request {request} is held by another trainer")
