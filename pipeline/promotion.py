"""Giving versions to workers and taking them back: the artefact is read first, the verdict is `pipeline.judgement`'s.

`watch` is called by the monitor at every tick: it lets a canary go live or takes it back, and takes a new live version
back that does worse than what it replaced. What it knows is rows, so that another monitor goes on where one died.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy import Engine, text

from pipeline import drift_reading, judgement, registry, versions
from pipeline.artefacts import Artefacts
from pipeline.judgement import Floats, Ints, Losses, Rules, Verdict
from pipeline.settings import Settings
from pipeline.versions import Change, NotPossible, Version

BATCHES = 2000  # newest rows of the record that are read, on either side
BEFORE = 10  # what was usual is taken from so many times the events that a verdict needs, the newest
MONITOR = "monitor"

_RECORD = text("""
    SELECT p.partition, e.user_id, e.loss, e.popular
    FROM (SELECT * FROM innerloop.prequential
        WHERE topic = :topic AND meta_version = :version AND recorded_at >= :since
            AND (CAST(:until AS timestamptz) IS NULL OR recorded_at < :until)
        ORDER BY recorded_at DESC LIMIT :batches) AS p
    CROSS JOIN LATERAL unnest(p.user_ids, p.loss_adapted, p.rank_adapted, p.rank_popular)
        AS e (user_id, loss, adapted, popular)
    WHERE e.adapted > 0 ORDER BY p.recorded_at DESC LIMIT :events""")
_PARTITIONS = text("SELECT partition FROM innerloop.stream_position WHERE topic = :topic ORDER BY partition")


@dataclass(frozen=True)
class Watched:
    """Where versions are watched: the database, the artefacts, and the topic that the record is of."""

    engine: Engine
    artefacts: Artefacts
    topic: str


def rules_of(settings: Settings) -> Rules:
    """When a version may go on, as the settings have it."""
    return Rules(
        least_events=settings.promote_events,
        least_users=settings.promote_users,
        canary_events=settings.canary_events,
        canary_hours=settings.canary_hours,
    )


def begin_canary(on: Watched, version: int, share: float, change: Change, found: dict[str, Any]) -> list[int]:
    """Put a version onto a share of the partitions, at least one; gives them.

    Raises NotPossible, and what `check` raises.
    """
    check(on, version)
    with on.engine.connect() as connection:
        held = list(connection.scalars(_PARTITIONS, {"topic": on.topic}))
    if not held:
        raise NotPossible("no worker has taken a partition yet: a canary would prove nothing, promote the version")
    number = max(1, round(share * len(held)))
    chosen = sorted(held[(version + place) % len(held)] for place in range(number))
    _map_from_live(on, version)
    versions.start_canary(on.engine, version, chosen, change, found)
    return chosen


def go_live(on: Watched, version: int, change: Change, *, only_from: str | None = None) -> int | None:
    """Make a version live; gives the one that it replaces. Raises NotPossible, and what `check` raises."""
    check(on, version)
    _map_from_live(on, version)
    return versions.promote(on.engine, version, change, only_from=only_from)


def return_to(on: Watched, version: int, change: Change, *, only_from: int | None = None) -> int:
    """Make an earlier version live again; gives the one it replaces. Raises NotPossible, and what `check` raises."""
    check(on, version)
    _map_from_live(on, version)
    return versions.roll_back(on.engine, change, to=version, only_from=only_from)


def check(on: Watched, version: int) -> None:
    """Read a version's artefact as a worker would.

    Raises ArtefactMissing, models.checkpoint.ArtefactRefused, or NotPossible for a version that there is none of.
    """
    versions.shown(on.engine, version)
    registry.load(on.engine, on.artefacts, version)


def watch(on: Watched, rules: Rules, *, now: datetime) -> list[str]:
    """Look at the canary and the live version once; gives what was done, in words."""
    done = []
    for version in versions.listed(on.engine, ["canary", "live"]):
        step = _watch_canary if version.status == "canary" else _watch_live
        try:
            done += step(on, version, rules, now)
        except NotPossible as overtaken:  # somebody else changed it meanwhile: the next tick sees what is
            done.append(f"left as it is: {overtaken}")
        except OSError as away:  # where artefacts lie does not answer: the next tick tries again
            done.append(f"left as it is, artefacts cannot be read: {away}")
    return done


def _watch_canary(on: Watched, version: Version, rules: Rules, now: datetime) -> list[str]:
    if broken := versions.refusals(on.engine, version):
        return _take_back(on, version, Verdict(False, f"a worker could not load it: {broken[0]}", {}))
    verdict = _canary_verdict(on, version, rules)
    if (
        verdict.good is None
        and version.canary_since
        and now > version.canary_since + timedelta(hours=rules.canary_hours)
    ):
        verdict = Verdict(False, f"no verdict within {rules.canary_hours:g} h: {verdict.reason}", verdict.figures)
    if verdict.good is None:
        return []
    if not verdict.good:
        return _take_back(on, version, verdict)
    if drift_reading.frozen(on.engine):
        return []  # it goes on being watched, and goes live when operators allow it
    versions.note(on.engine, version.version, {"canary": verdict.figures})
    try:
        replaced = go_live(on, version.version, Change(MONITOR, verdict.reason), only_from="canary")
    except registry.UNREADABLE as unreadable:
        return _take_back(on, version, Verdict(False, str(unreadable), verdict.figures))
    return [f"version {version.version} is live in place of {replaced}: {verdict.reason}"]


def _take_back(on: Watched, version: Version, verdict: Verdict) -> list[str]:
    found = {**version.judgement, "canary": verdict.figures}
    versions.reject(on.engine, version.version, Change(MONITOR, verdict.reason), found)
    return [f"canary {version.version} is taken back: {verdict.reason}"]


def _watch_live(on: Watched, version: Version, rules: Rules, now: datetime) -> list[str]:
    """Until the live version is shown to do as well as what it replaced, or worse."""
    del now
    replaced = version.judgement.get("replaced")
    if replaced is None or "live" in version.judgement:
        return []
    broken = versions.refusals(on.engine, version)
    verdict = (
        Verdict(False, f"a worker could not load it: {broken[0]}", {})
        if broken
        else _live_verdict(on, version, replaced, rules)
    )
    if verdict.good is None:
        return []
    versions.note(on.engine, version.version, {"live": verdict.figures})
    if verdict.good:
        return [f"version {version.version} stays live: {verdict.reason}"]
    try:
        return_to(on, replaced, Change(MONITOR, verdict.reason), only_from=version.version)
    except registry.UNREADABLE as gone:
        return [f"version {version.version} does worse but stays, {replaced} cannot be returned to: {gone}"]
    return [f"version {version.version} is rolled back to {replaced}: {verdict.reason}"]


def _canary_verdict(on: Watched, version: Version, rules: Rules) -> Verdict:
    live = versions.listed(on.engine, ["live"])[0].version
    moment, own = version.canary_since or version.changed_at, version.canary_partitions or []
    before = _record(on, live, since=moment - timedelta(days=1), until=moment, events=BEFORE * rules.canary_events)
    since = _record(on, version.version, since=moment - timedelta(minutes=1))
    others = _record(on, live, since=moment)
    mine = np.isin(before.partition, own)
    return judgement.canary(
        (before.losses(before, mine), since.losses(before)),
        (before.losses(before, ~mine), others.losses(before, ~np.isin(others.partition, own))),
        rules,
    )


def _live_verdict(on: Watched, version: Version, replaced: int, rules: Rules) -> Verdict:
    moment = version.live_since or version.changed_at
    before = _record(on, replaced, since=moment - timedelta(days=1), until=moment, events=BEFORE * rules.canary_events)
    since = _record(on, version.version, since=moment)
    # The canary's partitions were not under the version before: others are compared with themselves.
    others = np.isin(since.partition, before.partition)
    return judgement.successor(before.losses(before), since.losses(before, others), rules)


@dataclass(frozen=True)
class _Record:
    """Predictions of the prequential record as columns [E]; items without a vector are left out."""

    partition: Ints
    users: Ints
    loss: Floats
    popular: Ints

    def losses(self, before: _Record, chosen: Any = slice(None)) -> Losses:
        """The chosen losses, steadied by what was usual before."""
        steady = judgement.steadied(self.loss[chosen], self.popular[chosen], (before.loss, before.popular))
        return Losses(steady, self.users[chosen])


def _record(
    on: Watched, version: int, *, since: datetime, until: datetime | None = None, events: int | None = None
) -> _Record:
    wanted = {"topic": on.topic, "version": version, "since": since, "until": until}
    wanted |= {"batches": BATCHES, "events": events}
    with on.engine.connect() as connection:
        rows = connection.execute(_RECORD, wanted).all()
    partitions, users, losses, popular = zip(*rows, strict=True) if rows else ((), (), (), ())
    _, numbers = np.unique(np.array(users, dtype=str), return_inverse=True)
    return _Record(
        np.array(partitions, np.int64), numbers.astype(np.int64), np.array(losses, float), np.array(popular, np.int64)
    )


def _map_from_live(on: Watched, version: int) -> None:
    live = registry.live_version(on.engine)
    if live is None or live == version:
        return
    try:
        registry.map_states(on.engine, on.artefacts, live, version)
    except registry.UNREADABLE:
        return  # the live version cannot be read any more: its users' states begin anew
