"""`innerloop monitor`: reads the prequential record exactly once, finds drift, decides, and watches versions.

A plain loop. Position, state and findings move in one transaction of the connection that holds the topic's advisory
lock; the arithmetic is `pipeline.drift`'s and the verdicts `pipeline.drift_decision`'s. Killed at any moment it goes on
where the last transaction ended; others stand by.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import structlog
from sqlalchemy.exc import OperationalError

from pipeline import topics
from pipeline.drift import Alarm, DriftMonitor, Sensitivity
from pipeline.drift_decision import Thresholds
from pipeline.drift_inputs import InputMix
from pipeline.drift_store import MOST_ROWS, DriftStore, Piece
from pipeline.failpoints import arm, reach
from pipeline.logs import quieten_logs
from pipeline.monitor_case import Cases, Seen
from pipeline.monitor_sight import STILL_SECONDS, Sight
from pipeline.session import StoreUnavailable
from pipeline.settings import Settings
from schemas.database import check_role, check_schema, connect_engine

log = structlog.get_logger()

OK = 0
STAND_BY_SECONDS = 0.5
TRIM_SECONDS, TRIM_BATCHES = 60.0, 200


def run(settings: Settings) -> int:
    """Run the monitor until SIGTERM or SIGINT; gives the exit code. Raises ConfigurationError."""
    quieten_logs()
    arm(settings.failpoints)
    settings.broker_address()  # the probe and a stream that stands still need it: better said now than at night
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return Monitor(settings, stop).run()


class Monitor:
    """The loop and what it holds; all of it is in the database after every tick."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._settings, self._stop = settings, stop
        self._engine = connect_engine(settings.database("writer"), options="-c lock_timeout=5000")
        self._store = DriftStore(self._engine, settings.topic_interactions)
        self._holder = f"{socket.gethostname()}:{os.getpid()}"
        self._cases = Cases(self._store, thresholds(settings), self._gain_of_refit)
        self._sensitivity = Sensitivity(overall=settings.drift_delta, segment=settings.drift_segment_delta)
        self._trimmed_at, self._watched_at = -TRIM_SECONDS, -1e9
        self._came_at = time.monotonic()  # when something was read, or the broker asked why nothing was

    def run(self) -> int:
        """Stand by, watch, and stand by again whenever the database went away."""
        said = False
        while not self._stop.is_set():
            try:
                self._check()
                if not self._store.acquire():
                    if not said:
                        log.info("standing by: another monitor watches this topic")
                    said = True
                    self._stop.wait(STAND_BY_SECONDS)
                    continue
                said = False
                self._watch()
            except (StoreUnavailable, OperationalError) as away:
                log.warning("waiting", reason=str(away).split("\n")[0])
                self._stop.wait(1.0)
        self._store.close()
        self._cases.stop()
        log.info("stopped")
        return OK

    def _check(self) -> None:
        check_schema(self._engine)
        check_role(self._engine, "writer")

    def _watch(self) -> None:
        with self._store.transaction() as cursor:
            self._load(cursor)
            self._store.note_alive(cursor, self._holder, self._alive(), self._mix.report())
        print(json.dumps({"event": "ready", "labels": self._drift.num_fed, "version": self._version}), flush=True)
        while not self._stop.is_set():
            started = time.monotonic()
            read = self.tick()
            self._watch_versions()
            self._look_out(read)
            if not self._trim() and read < MOST_ROWS:
                self._stop.wait(max(0.05, self._settings.drift_seconds - (time.monotonic() - started)))

    def _watch_versions(self) -> None:
        """Let promotion look at the canary and the live version, as often as the record is read."""
        if time.monotonic() - self._watched_at < self._settings.drift_seconds:
            return
        self._watched_at = time.monotonic()
        from pipeline import promotion  # brings torch
        from pipeline.artefacts import Artefacts

        s = self._settings
        watched = promotion.Watched(self._engine, Artefacts(s.artefacts_place()), s.topic_interactions)
        for done in promotion.watch(watched, promotion.rules_of(s), now=datetime.now(UTC)):
            log.info("versions", done=done)

    def _load(self, cursor: Any) -> None:
        numbers, inputs = self._store.load(cursor)
        self._drift = (
            DriftMonitor.restore(numbers["drift"], inputs, self._sensitivity)
            if numbers
            else DriftMonitor(self._sensitivity)
        )
        self._mix = InputMix.restore(numbers["mix"]) if numbers else InputMix()
        self._version: int | None = numbers.get("version")
        self._cases.restore(numbers.get("case"))
        self._sight = Sight(numbers.get("recent"), numbers.get("blind", ""))
        self._saved, self._saved_numbers = inputs, ""

    def tick(self) -> int:
        """Read on, find, decide, save; gives how many micro-batches were read."""
        with self._store.transaction() as cursor:
            self._follow(self._store.live(cursor))
            positions = self._store.positions(cursor)
            pieces = self._store.read(cursor)
            for piece in pieces:
                positions[piece.partition] = piece.next_offset
                fed = self._drift.num_fed
                alarms = self._observe(cursor, piece)
                if alarms and self._cases.open is None:
                    at = int(np.flatnonzero(piece.observations.finite)[alarms[0].at - fed])
                    self._cases.begin(cursor, piece, at, alarms[0], positions)
            if len(pieces) < MOST_ROWS:  # this snapshot was read to its end
                self._sight.look(self._store.unread(cursor))
            self._cases.consider(cursor, Seen(self._drift, self._mix, self._version, self._sight.blind))
            self._save(cursor)
            self._store.note_alive(cursor, self._holder, self._alive(), self._mix.report())
            reach("before_monitor_commit")
        reach("after_monitor_commit")
        return len(pieces)

    def _follow(self, version: int | None) -> None:
        """Another live version has a level of its own, and an open case was the earlier one's."""
        if version != self._version:
            self._drift.restart()
            self._version = version
            self._cases.restore(None)

    def _observe(self, cursor: Any, piece: Piece) -> list[Alarm]:
        """Feed the labels of one micro-batch, if they are the live version's; gives the alarms for the worse."""
        seen = piece.observations
        self._mix.add(seen.items, seen.new_items, piece.applied_types, seen.event_ms)
        if piece.version != self._version:
            return []
        unusable = self._drift.num_unusable
        found = self._drift.observe(seen)
        self._sight.add(len(seen), self._drift.num_unusable - unusable)
        self._store.note_alarms(cursor, found, piece.record_ms, self._version)
        for alarm in found:
            log.info("worse" if alarm.worse else "better", series=alarm.series, label=alarm.at)
        return [alarm for alarm in found if alarm.worse]

    def _look_out(self, read: int) -> None:
        """Where nothing has been read for long, ask the broker whether there is anything to read."""
        if read:
            self._came_at = time.monotonic()
            self._sight.go_on()
        if time.monotonic() - self._came_at < STILL_SECONDS:
            return
        self._came_at = time.monotonic()
        topic = self._settings.topic_interactions
        try:
            ends = topics.end_offsets(self._settings.broker_address(), topic)
        except (topics.BrokerUnavailable, topics.TopicMissing) as away:
            return self._sight.lose(str(away).split("\n")[0])
        with self._store.transaction() as cursor:
            self._sight.wait(ends, self._store.stream_positions(cursor))

    def _gain_of_refit(self, window_ms: tuple[int, int]) -> float:
        from pipeline.monitor_probe import gain_of_refit  # brings torch, which a quiet monitor does not need

        return gain_of_refit(self._settings, window_ms)

    def _alive(self) -> tuple[int | None, int, str, str | None]:
        opened = self._drift.case
        return self._version, self._drift.num_fed, self._sight.blind, opened.alarm.series if opened else None

    def _save(self, cursor: Any) -> None:
        numbers, inputs = self._drift.state()
        changed = {name: kept for name, kept in inputs.items() if self._saved.get(name) != kept}
        plain: dict[str, Any] = {
            "drift": numbers,
            "mix": self._mix.state(),
            "version": self._version,
            "case": self._cases.open,
        }
        plain |= {"recent": self._sight.recent, "blind": self._sight.blind}
        text = json.dumps(plain)
        if changed or text != self._saved_numbers:
            self._store.save(cursor, text, changed, list(inputs))
        self._saved, self._saved_numbers = inputs, text

    def _trim(self) -> bool:
        """Let some of the record's old rows become hours; True where there may be more of them."""
        if time.monotonic() - self._trimmed_at < TRIM_SECONDS:
            return False
        with self._store.transaction() as cursor:
            more = self._store.trim(cursor, self._settings.drift_record_hours, TRIM_BATCHES) == TRIM_BATCHES
        if not more:
            self._trimmed_at = time.monotonic()
        return more


def thresholds(settings: Settings) -> Thresholds:
    """The decision's thresholds as the settings have them."""
    return Thresholds(
        least_worse=settings.drift_least_worse,
        standard_errors=settings.drift_standard_errors,
        labels=settings.drift_labels,
        users=settings.drift_users,
        user_weight=settings.drift_user_weight,
        new_labels=settings.drift_new_labels,
        cool_down_seconds=3600 * settings.drift_cool_down_hours,
        cool_down_labels=settings.drift_cool_down_labels,
        per_day=settings.drift_per_day,
        dead_letters=settings.drift_dead_letters,
        top_share=settings.drift_top_share,
        days=settings.drift_days,
        cost=settings.drift_cost,
    )
