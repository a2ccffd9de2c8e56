"""The demo's last act: articles come to mean something else, and a new version comes of it by itself.

A shop of its own on synthetic events, so that what changes is known: from one event on every article stands for what
another one did, as where article numbers are used again, while the texts stay. Everything runs as it is deployed; only
the thresholds are those of a shop with a few thousand events. There is one partition, records carry the events' own
times, and the feed pauses while it is decided, trained and judged, so the same seed gives the same figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import text

from pipeline import drift_picture, drift_reading, meta_training, versions
from pipeline.cli_output import say
from pipeline.demo_parts import DemoFailed, Process, write_lines
from pipeline.demo_stage import Stage, embedded, running, until
from pipeline.outbox import Outbox
from pipeline.synthetic import Drawn, Drift, Plan, catalogue, draw_events

HISTORY, QUIET, CURED = 5000, 5000, 3000  # events that are learnt from first; before the change; after the cure
LEARN, TRIAL, FINDING = 3000, 500, 2000  # labels to learn from; events of the canary; at most until the alarm
BLOCK = 250  # events between two looks for an alarm
VISITORS, EVENTS_EACH = 150, 13  # at any time; by each
ENCODER, PARTITIONS = "hashed:64", 1
VARIABLES = {
    "INNERLOOP_ENCODER": ENCODER,
    "INNERLOOP_DRIFT_SECONDS": "0.2",
    "INNERLOOP_DRIFT_LABELS": "1000",
    "INNERLOOP_DRIFT_USERS": "100",
    "INNERLOOP_DRIFT_NEW_LABELS": str(LEARN),
    "INNERLOOP_PROMOTE_EVENTS": "500",
    "INNERLOOP_PROMOTE_USERS": "50",
    "INNERLOOP_CANARY_EVENTS": str(TRIAL),
}

_FIGURES = text(
    """
    SELECT avg(loss_adapted), avg((rank_adapted BETWEEN 1 AND 10)::int)
    FROM innerloop.prequential_events WHERE topic = :topic AND "offset" >= :first AND "offset" < :last
    """
)
_ALARM = text("SELECT label FROM innerloop.drift_alarms WHERE worse ORDER BY alarm LIMIT 1")
_DECISION = text("SELECT verdict, reason FROM innerloop.drift_decisions ORDER BY decision DESC LIMIT 1")
_IN_USE = text("SELECT value FROM innerloop.activations WHERE kind = 'meta_version' ORDER BY from_offset DESC LIMIT 1")
_READ = text(
    """
    SELECT s.next_offset, d.next_offset FROM innerloop.stream_position s
    LEFT JOIN innerloop.drift_positions d USING (topic, partition) WHERE s.topic = :topic
    """
)


@dataclass(frozen=True)
class Phase:
    """Events of one phase: how many, under which version, mean loss in nats, hit rate@10 of the next item."""

    name: str
    num_events: int
    version: int
    loss: float
    hit_rate: float


@dataclass(frozen=True)
class Cure:
    """What the act ended with: phases in their order, what was decided on the way, and where the picture is."""

    phases: list[Phase]
    steps: list[str]
    picture: str | None

    def as_text(self) -> list[str]:
        """Return lines for the summary."""
        rows = [
            f"  {phase.name:24} version {phase.version}   loss {phase.loss:.3f}   hit rate@10 {phase.hit_rate:.3f}   "
            f"({phase.num_events:,} events)"
            for phase in self.phases
        ]
        shown = [f"  drawn to {self.picture}"] if self.picture else []
        return [
            "A drift and its cure, in a synthetic shop: every article comes to stand for what another one did,",
            "its text stays; thresholds are those of a shop with a few thousand events",
            *rows,
            *(f"  {step}" for step in self.steps),
            *shown,
        ]


def play(folder: Path, *, seed: int, picture: Path | None) -> Cure:
    """Play the act in a folder of its own. Raises DemoFailed."""
    plan = plan_of(seed)
    with embedded(folder, partitions=PARTITIONS, encoder=ENCODER) as stage:
        shop = _Shop(stage, draw_events(plan))
        shop.open(list(catalogue(plan)), seed)
        with running(stage, "worker", **VARIABLES) as worker, running(stage, "monitor", **VARIABLES) as monitor:
            phases, steps = shop.play(worker, monitor)
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            drift_picture.save(drift_reading.history(stage.reader, stage.settings.topic_interactions), picture)
    return Cure(phases, steps, str(picture) if picture else None)


def plan_of(seed: int) -> Plan:
    """Visitors come and go; the meaning of all articles changes after the quiet part."""
    at = HISTORY + QUIET
    choices = at + FINDING + LEARN + TRIAL + CURED
    users = choices // EVENTS_EACH
    return Plan(
        users=users, items=200, choices=choices, sharpness=5.0, activity=0.3, arrivals=1.0, stay=VISITORS / users,
        choices_per_day=2000.0, seed=seed, drifts=(Drift(at, "meaning"),),
    )  # fmt: skip


class _Shop:
    """The act while it is played; events are numbered by their offsets."""

    def __init__(self, stage: Stage, stream: Iterator[Drawn]) -> None:
        self._stage, self._stream = stage, stream
        self._topic = stage.settings.topic_interactions
        self._parts: tuple[Process, ...] = ()
        self._fed = 0

    def open(self, items: list[dict[str, Any]], seed: int) -> None:
        """Send the catalogue, and learn the first version from what happened before."""
        settings, folder = self._stage.settings, self._stage.settings.home / "demo"
        with Outbox(self._stage.endpoints.broker, settings.topic_items) as outbox:
            for number, item in enumerate(items):
                outbox.send(number, item["item_id"].encode(), msgspec.json.encode(item))
        history = [drawn.event for drawn in islice(self._stream, HISTORY)]
        files = [write_lines(folder / f"{name}.jsonl", rows) for name, rows in (("fit", history), ("items", items))]
        meta_training.run(settings, interactions_file=str(files[0]), items_file=str(files[1]), seed=seed)

    def play(self, *parts: Process) -> tuple[list[Phase], list[str]]:
        """Quiet, change, alarm, decision, training, judgement, canary, live; gives phases and steps."""
        self._parts = parts
        self._feed(QUIET)
        alarm = self._change()
        phases = [self._phase("before", QUIET - CURED, QUIET), self._phase("after the change", QUIET, self._fed)]
        steps = [f"alarm {alarm - QUIET:,} events after the change; after {LEARN:,} more: {self._decision()}"]
        say(steps[-1])
        if self._verdict() == "retrain" and self._canary(steps):
            self._feed(CURED)
            cured = self._phase("cured", self._fed - CURED, self._fed)
            phases.append(cured if cured.version > 1 else replace(cured, name="not cured"))
        return phases, steps

    def _canary(self, steps: list[str]) -> bool:
        """Train, judge and try a version, noting each step; whether it came as far as being tried."""
        say("the trainer works on it, the feed waits")
        variables, log = self._stage.variables() | VARIABLES, self._stage.settings.home / "trainer.log"
        with Process(("trainer", "--once"), variables, log) as trainer:
            trainer.wait_ended()
        made = versions.listed(self._stage.reader)[0]
        steps.append(f"version {made.version}, {made.reason}")
        say(steps[-1])
        if made.status != "canary":
            return False
        self._wait("the canary in use", lambda: self._value(_IN_USE) == made.version)
        self._feed(TRIAL)
        self._wait("the canary's verdict", lambda: versions.shown(self._stage.reader, made.version).status != "canary")
        tried = versions.shown(self._stage.reader, made.version)
        steps.append(f"as a canary it is {tried.status} after {TRIAL:,} events")
        say(steps[-1])
        return True

    def _change(self) -> int:
        """Feed until the monitor has decided; gives the event that raised the alarm."""
        say("every article comes to mean something else")
        while (alarm := self._value(_ALARM)) is None:
            if self._fed >= QUIET + FINDING:
                raise DemoFailed(f"no alarm within {FINDING:,} events")
            self._feed(BLOCK)
        self._feed(int(alarm) + 1 + LEARN - self._fed)
        self._wait("a decision", lambda: self._verdict() != "wait")
        return int(alarm)

    def _feed(self, count: int) -> None:
        """Send events with their own times, and wait until worker and monitor have read them."""
        with Outbox(self._stage.endpoints.broker, self._topic) as outbox:
            for number, drawn in enumerate(islice(self._stream, count)):
                event = drawn.event
                outbox.send(number, event["user_id"].encode(), msgspec.json.encode(event), timestamp_ms=event["ts"])
            outbox.flush()
            self._fed += outbox.delivered
        self._wait("the shop's events", lambda: self._read() == (self._fed, self._fed))

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        until(what, condition, *self._parts)

    def _read(self) -> tuple[int, int]:
        with self._stage.reader.connect() as connection:
            row = connection.execute(_READ, {"topic": self._topic}).one_or_none()
        return (row[0], row[1]) if row else (0, 0)

    def _phase(self, name: str, first: int, last: int) -> Phase:
        with self._stage.reader.connect() as connection:
            loss, hits = connection.execute(_FIGURES, {"topic": self._topic, "first": first, "last": last}).one()
        live = versions.listed(self._stage.reader, ["live"])[0].version
        return Phase(name, last - first, live, float(loss), float(hits))

    def _verdict(self) -> str:
        return str(self._value(_DECISION))

    def _decision(self) -> str:
        with self._stage.reader.connect() as connection:
            row = connection.execute(_DECISION).one()
        return f"{row.verdict}, {row.reason}"

    def _value(self, query: Any) -> Any:
        with self._stage.reader.connect() as connection:
            return connection.scalar(query)
