"""The career of a version: challenger → canary → live → retired, or rejected. Each step is one transaction with its
reason and an audit row, under one lock, so that of two people (or a person and the monitor) one comes second.

Artefacts are not looked at here: whoever gives a version to workers has read it before (`pipeline.promotion`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Row, cast, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import JSONB

from schemas.tables import audit, meta_versions

CAREER_LOCK = 0x696E_6E65_726C_6361  # advisory, of the transaction


class NotPossible(Exception):
    """The version's status, or another's, does not allow this step: look at `innerloop models list`."""


@dataclass(frozen=True)
class Version:
    """One row of `meta_versions`."""

    version: int
    parent: int | None
    status: str
    sha256: str
    encoder: str
    request: int | None
    window_from_ms: int | None
    window_to_ms: int | None
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    judgement: dict[str, Any]
    canary_partitions: list[int] | None
    canary_since: datetime | None
    created_at: datetime
    live_since: datetime | None
    changed_at: datetime
    changed_by: str
    reason: str


@dataclass(frozen=True)
class Change:
    """Who or what changes a version's status, and why."""

    by: str
    reason: str


_COLUMNS = [meta_versions.c[name] for name in Version.__dataclass_fields__]


def listed(engine: Engine, statuses: Iterable[str] = ()) -> list[Version]:
    """Return all versions, or those of these statuses, newest first."""
    wanted = list(statuses)
    query = select(*_COLUMNS).order_by(meta_versions.c.version.desc())
    with engine.connect() as connection:
        rows = connection.execute(query.where(meta_versions.c.status.in_(wanted)) if wanted else query)
        return [_version(row) for row in rows]


def shown(engine: Engine, version: int) -> Version:
    """Return one version. Raises NotPossible when there is none of this number."""
    with engine.connect() as connection:
        return _one(connection, version)


def history(engine: Engine, version: int | None = None, *, limit: int = 100) -> list[dict[str, Any]]:
    """Return audit rows of one version, or of all, newest first."""
    columns = audit.c.at, audit.c.login, audit.c.actor, audit.c.action, audit.c.subject, audit.c.detail
    query = select(*columns).where(audit.c.subject.like("version %")).order_by(audit.c.audit.desc()).limit(limit)
    if version is not None:
        query = query.where(audit.c.subject == f"version {version}")
    with engine.connect() as connection:
        return [dict(row._mapping) for row in connection.execute(query)]


def promotions(engine: Engine) -> dict[int, Change]:
    """Return who or what last made each version live, and why; those that no step made live are left out."""
    steps = audit.c.action.in_(("promote", "restore"))
    query = select(audit.c.subject, audit.c.actor, audit.c.detail["reason"].astext).where(steps).order_by(audit.c.audit)
    with engine.connect() as connection:
        rows = connection.execute(query)
        return {int(subject.removeprefix("version ")): Change(by, why) for subject, by, why in rows}


def start_canary(
    engine: Engine, version: int, partitions: Iterable[int], change: Change, judgement: Mapping[str, Any]
) -> None:
    """Give a challenger, or an earlier version, some partitions to prove itself on, beside the live one."""
    with _career(engine) as connection:
        found = _one(connection, version)
        _require(found.status in {"challenger", "retired", "rejected"}, found, "become a canary")
        other = _with_status(connection, "canary")
        _require(other is None, found, f"become a canary beside version {other and other.version}")
        _require(_with_status(connection, "live") is not None, found, "become a canary without a live version")
        values: dict[str, Any] = {
            "canary_partitions": sorted(partitions),
            "canary_since": text("now()"),
            "judgement": dict(judgement),
        }
        _move(connection, found, "canary", change, "canary", **values)


def promote(engine: Engine, version: int, change: Change, *, only_from: str | None = None) -> int | None:
    """Make a version live in place of the one that is; gives that one's number.

    `only_from`: the status that the version was judged in; NotPossible when it has another by now.
    """
    with _career(engine) as connection:
        found = _one(connection, version)
        _require(found.status != "live", found, "go live")
        _require(only_from in {None, found.status}, found, "go live")
        live = _with_status(connection, "live")
        if live:
            _move(connection, live, "retired", Change(change.by, f"version {version} went live"), "retire")
        # What was found of it when it was live before says nothing of now: it is watched again.
        judgement = {name: value for name, value in found.judgement.items() if name != "live"}
        judgement["replaced"] = live and live.version
        _move(connection, found, "live", change, "promote", live_since=text("now()"), judgement=judgement)
        return None if live is None else live.version


def reject(engine: Engine, version: int, change: Change, judgement: Mapping[str, Any] | None = None) -> None:
    """Take a challenger or a canary out of the race; a canary's partitions go back to the live version."""
    with _career(engine) as connection:
        found = _one(connection, version)
        _require(found.status in {"challenger", "canary"}, found, "be rejected")
        action = "reject" if found.status == "challenger" else "roll_back"
        values: dict[str, Any] = {} if judgement is None else {"judgement": dict(judgement)}
        _move(connection, found, "rejected", change, action, **values)


def roll_back(engine: Engine, change: Change, *, to: int, only_from: int | None = None) -> int:
    """Make an earlier version live again and reject the live one; gives the rejected one's number.

    `only_from`: the live version that was judged; NotPossible when another is live by now.
    """
    with _career(engine) as connection:
        found, live = _one(connection, to), _with_status(connection, "live")
        if live is None:
            raise NotPossible("no version is live: there is nothing to roll back")
        _require(found.live_since is not None and found.version != live.version, found, "be rolled back to")
        _require(only_from in {None, live.version}, live, "be rolled back")
        if canary := _with_status(connection, "canary"):
            # It was judged against a version that is not to be trusted.
            _move(connection, canary, "rejected", change, "roll_back")
        _move(connection, live, "rejected", change, "roll_back", told={"to": to})
        _move(connection, found, "live", change, "restore", live_since=text("now()"))
        return live.version


def note(engine: Engine, version: int, judgement: Mapping[str, Any]) -> None:
    """Keep what was found about a version whose status stays."""
    added = cast(dict(judgement), JSONB)
    statement = update(meta_versions).where(meta_versions.c.version == version)
    with engine.begin() as connection:
        connection.execute(statement.values(judgement=meta_versions.c.judgement.op("||")(added)))


def before(engine: Engine) -> int:
    """Return the version that was live before the live one. Raises NotPossible without one."""
    query = select(meta_versions.c.version).where(meta_versions.c.status == "retired")
    with engine.connect() as connection:
        found = connection.scalar(query.order_by(meta_versions.c.live_since.desc().nulls_last()).limit(1))
    if found is None:
        raise NotPossible("no earlier version was live: there is nothing to roll back to")
    return int(found)


def refusals(engine: Engine, version: Version) -> list[str]:
    """Return why workers could not take a version into use since its status last changed."""
    query = select(audit.c.detail["reason"].astext).where(
        audit.c.action == "refuse", audit.c.subject == f"version {version.version}", audit.c.at >= version.changed_at
    )
    with engine.connect() as connection:
        return list(connection.scalars(query))


@contextmanager
def _career(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        connection.execute(select(func.pg_advisory_xact_lock(CAREER_LOCK)))
        yield connection


def _one(connection: Connection, version: int) -> Version:
    row = connection.execute(select(*_COLUMNS).where(meta_versions.c.version == version)).one_or_none()
    if row is None:
        raise NotPossible(f"there is no version {version}: see `innerloop models list`")
    return _version(row)


def _with_status(connection: Connection, status: str) -> Version | None:
    row = connection.execute(select(*_COLUMNS).where(meta_versions.c.status == status)).one_or_none()
    return None if row is None else _version(row)


def _version(row: Row[Any]) -> Version:
    return Version(**row._mapping)


def _require(possible: bool, version: Version, what: str) -> None:
    if not possible:
        raise NotPossible(f"version {version.version} is {version.status}: it cannot {what}")


def _move(
    connection: Connection,
    version: Version,
    status: str,
    change: Change,
    action: str,
    *,
    told: Mapping[str, Any] | None = None,
    **values: Any,
) -> None:
    row = {"status": status, "changed_at": func.clock_timestamp(), "changed_by": change.by, "reason": change.reason}
    connection.execute(update(meta_versions).where(meta_versions.c.version == version.version).values(**row, **values))
    detail = {"from": version.status, "to_status": status, "reason": change.reason, **(told or {})}
    subject = f"version {version.version}"
    connection.execute(insert(audit).values(actor=change.by, action=action, subject=subject, detail=detail))
