"""The demo's last act: tastes change, the monitor asks for a new version, the trainer makes and judges it.

The feed pauses while it is decided, trained and judged. Everything runs as it is deployed; only the thresholds are
those of a demo, where a day lasts a minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine, text

from pipeline import versions
from pipeline.cli_output import say
from pipeline.demo_parts import DemoFailed, Process

Event = dict[str, Any]

STRATUM = 40  # films of about the same popularity change places
SETTLING, MEASURED, TRIAL = 6000, 4000, 3000  # events after the change; then those that are compared; the canary's
PATIENCE_SECONDS, TRAINING_SECONDS = 90.0, 300.0
THRESHOLDS = {
    "INNERLOOP_DRIFT_SECONDS": "1",
    "INNERLOOP_DRIFT_DAYS": "0",
    "INNERLOOP_DRIFT_LABELS": "1500",
    "INNERLOOP_DRIFT_USERS": "30",
    "INNERLOOP_DRIFT_USER_WEIGHT": "0.2",
    "INNERLOOP_DRIFT_NEW_LABELS": "4000",
    "INNERLOOP_DRIFT_COOL_DOWN_HOURS": "0",
    "INNERLOOP_DRIFT_COOL_DOWN_LABELS": "0",
    "INNERLOOP_DRIFT_TOP_SHARE": "0.5",
    "INNERLOOP_PROMOTE_EVENTS": "500",
    "INNERLOOP_PROMOTE_USERS": "10",
    "INNERLOOP_CANARY_EVENTS": "300",
}

_FIGURES = text("""
    SELECT count(*), avg(loss_adapted), avg((rank_adapted BETWEEN 1 AND 10)::int)
    FROM innerloop.prequential_events WHERE topic = :topic AND recorded_at >= to_timestamp(:since)""")
_REQUESTS = text("SELECT count(*) FROM innerloop.retrain_requests")
_DECISION = text("SELECT verdict, reason FROM innerloop.drift_decisions ORDER BY decision DESC LIMIT 1")


@dataclass(frozen=True)
class Phase:
    """Events of one phase: how many, mean loss in nats, hit rate@10, and the version that was live at its end."""

    name: str
    num_events: int
    loss: float
    hit_rate: float
    version: int


@dataclass(frozen=True)
class Cure:
    """What the act ended with: phases in their order, and what was decided on the way, in words."""

    phases: list[Phase]
    steps: list[str]

    def as_text(self) -> list[str]:
        """Return lines for the summary."""
        rows = [
            f"  {phase.name:34} version {phase.version}   loss {phase.loss:.3f}   hit rate@10 {phase.hit_rate:.4f}   "
            f"({phase.num_events:,} events)"
            for phase in self.phases
        ]
        return ["A change of taste, and its cure", *rows, *(f"  {step}" for step in self.steps)]


@dataclass(frozen=True)
class Scene:
    """Where the act takes place, and how events are fed: `feed` returns when all are applied."""

    reader: Engine
    topic: str
    variables: dict[str, str]
    folder: Path
    feed: Callable[[Sequence[Event], float], None]


def changed(events: Iterable[Event], num_events: int, seed: int) -> list[Event]:
    """Return events of new users to whom every film is what another one of its popularity was."""
    kept = list(events)[:num_events]
    counts: dict[str, int] = {}
    for event in kept:
        counts[event["item_id"]] = counts.get(event["item_id"], 0) + 1
    ordered = sorted(counts, key=lambda item: (-counts[item], item))
    draw, other = np.random.default_rng(seed), dict[str, str]()
    for start in range(0, len(ordered), STRATUM):
        stratum = ordered[start : start + STRATUM]
        other |= dict(zip(stratum, (stratum[at] for at in draw.permutation(len(stratum))), strict=True))
    return [{**e, "user_id": f"changed-{e['user_id']}", "item_id": other[e["item_id"]]} for e in kept]


def play(scene: Scene, events: Sequence[Event], *, rate: float) -> Cure:
    """Play the act; `events` are those of `changed`."""
    phases, steps = [_phase(scene, "before", 0.0)], list[str]()
    first, second, trial, last = _cut(events, SETTLING, MEASURED, TRIAL)
    with Process(("monitor",), scene.variables | THRESHOLDS, scene.folder / "monitor.log") as monitor:
        monitor.wait_ready()
        say(f"tastes change: {len(first) + len(second):,} events, then the feed pauses")
        scene.feed(first, rate)
        since = time.time()
        scene.feed(second, rate)
        phases.append(_phase(scene, "after the change", since))
        if _until(lambda: _count(scene) > 0, monitor):
            steps.append(f"the monitor asked for a new version: {_decision(scene)}")
            say(steps[-1])
            _train(scene)
            steps += _trial(scene, trial, rate, monitor)
            since = time.time()
            scene.feed(last, rate)
            phases.append(_phase(scene, "after the cure", since))
        else:
            steps.append(f"the monitor did not ask for a new version: {_decision(scene)}")
        code = monitor.stop()
    if code != 0:
        raise DemoFailed(f"the monitor ended with exit code {code} instead of 0")
    return Cure(phases, steps)


def _cut(events: Sequence[Event], *lengths: int) -> list[Sequence[Event]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(events[start : start + length])
        start += length
    return [*parts, events[start:]]


def _train(scene: Scene) -> None:
    say("the trainer works on it, the feed waits")
    words = ("trainer", "--once")
    with Process(words, scene.variables | THRESHOLDS, scene.folder / "trainer.log") as trainer:
        trainer.wait_ended(TRAINING_SECONDS)


def _trial(scene: Scene, events: Sequence[Event], rate: float, monitor: Process) -> list[str]:
    """Feed on while a canary proves itself; gives what became of the newest version."""
    newest = versions.listed(scene.reader)[0]
    steps = [f"version {newest.version} is {newest.status}: {newest.reason}"]
    say(steps[-1])
    if newest.status == "canary":
        scene.feed(events, rate)
        _until(lambda: versions.shown(scene.reader, newest.version).status != "canary", monitor)
        newest = versions.shown(scene.reader, newest.version)
        steps.append(f"version {newest.version} is {newest.status}: {newest.reason}")
        say(steps[-1])
    return steps


def _until(condition: Callable[[], bool], monitor: Process) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        monitor.check()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _phase(scene: Scene, name: str, since: float) -> Phase:
    with scene.reader.connect() as connection:
        num, loss, hits = connection.execute(_FIGURES, {"topic": scene.topic, "since": since}).one()
    live = versions.listed(scene.reader, ["live"])[0].version
    return Phase(name, int(num), float(loss or 0.0), float(hits or 0.0), live)


def _count(scene: Scene) -> int:
    with scene.reader.connect() as connection:
        return int(connection.execute(_REQUESTS).scalar_one())


def _decision(scene: Scene) -> str:
    with scene.reader.connect() as connection:
        row = connection.execute(_DECISION).one_or_none()
    return f"{row.verdict}, {row.reason}" if row else "it saw no drift"
