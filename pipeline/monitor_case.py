"""A case that an alarm opened: its evidence, the probe of what a refit would gain, and every decision as a row.

What was recorded after the label that raised the alarm is the evidence, and what there is to learn from. The probe
runs in a thread of its own, because the record must be read meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import structlog
from sqlalchemy.exc import OperationalError

from pipeline.drift import Alarm, DriftMonitor, Observations
from pipeline.drift_decision import (
    UNKNOWN_GAIN,
    Circumstances,
    Decision,
    Evidence,
    Thresholds,
    as_numbers,
    decide,
    weigh,
)
from pipeline.drift_inputs import InputMix
from pipeline.drift_store import DriftStore, Piece
from pipeline.topics import BrokerUnavailable
from pipeline.training_data import NothingToLearn

log = structlog.get_logger()

LOOK_AGAIN = 250  # labels between two looks at an open case
EVIDENCE_BATCHES = 4000
# What may keep a probe from its answer and passes: broker, database or artefacts away, nothing of the window in the
# topic yet. Anything else is a fault of ours, which ends the process; the restart finds the case where it was.
PASSING = (BrokerUnavailable, OperationalError, OSError, NothingToLearn)

Probe = Callable[[tuple[int, int]], float]  # nats a label that a refit on this window of Kafka times saves


@dataclass(frozen=True)
class Seen:
    """What the monitor knows of its topic: residuals, input mix, live version, and why it is blind ("" if not)."""

    drift: DriftMonitor
    mix: InputMix
    version: int | None
    blind: str


class Cases:
    """The open case, if there is one. `open` holds what is saved of it."""

    def __init__(self, store: DriftStore, limits: Thresholds, probe: Probe) -> None:
        self.open: dict[str, Any] | None = None
        self._store, self._limits = store, limits
        self._gain_of = probe
        self._threads = ThreadPoolExecutor(1, "probe")
        self._gain: float | None = None
        self._probe: Future[float] | None = None

    def restore(self, kept: dict[str, Any] | None) -> None:
        """Go on with what was saved; a probe under way is asked again."""
        self.open, self._gain, self._probe = kept, None, None

    def stop(self) -> None:
        """Take no further probe."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def begin(self, cursor: Any, piece: Piece, at: int, alarm: Alarm, positions: dict[int, int]) -> None:
        """Open a case at label `at` of a piece; `positions` are what was read of the partitions."""
        log.info("case opened", series=alarm.series)
        since = positions | {piece.partition: int(piece.offsets[at]) + 1}
        self.open = {
            "positions": {str(partition): offset for partition, offset in since.items()},
            "record_ms": int(piece.record_times[at]),
            "letters": self._store.letters(cursor),
            "looked": -LOOK_AGAIN,
            "said": "",
        }

    def consider(self, cursor: Any, seen: Seen) -> None:
        """Decide where there is something new to decide on; write what has changed."""
        case, opened = self.open, seen.drift.case
        if case is None or opened is None:
            return
        labels = seen.drift.num_fed - opened.alarm.at - 1
        answered = self._probe is not None and self._probe.done()
        enough = case["looked"] < self._limits.new_labels <= labels
        if labels - case["looked"] < LOOK_AGAIN and not (enough or answered):
            return
        case["looked"] = labels
        if answered:
            self._take_answer()
        evidence, record_ms = self._evidence(cursor, case, seen)
        now = self._circumstances(cursor, case, seen, labels, record_ms)
        decision = decide(evidence, now, self._limits)
        if decision.reasons == (UNKNOWN_GAIN,) and self._probe is None:
            window = case["record_ms"], record_ms
            absorbed = evidence.absorbed if evidence else 0.0
            self._probe = self._threads.submit(self._beyond, window, absorbed)
        said = decision.verdict + re.sub(r"[\d,.%+−-]+", "#", decision.reason)
        if said != case["said"]:
            case["said"] = said
            self._decided(cursor, decision, seen, (evidence, now, record_ms))
        if decision.verdict != "wait":
            seen.drift.close_case()
            self.restore(None)

    def _evidence(self, cursor: Any, case: dict[str, Any], seen: Seen) -> tuple[Evidence | None, int]:
        positions = {int(partition): at for partition, at in case["positions"].items()}
        pieces = self._store.read_since(cursor, positions, seen.version or -1, EVIDENCE_BATCHES)
        opened = seen.drift.case
        if not pieces or opened is None:
            return None, case["record_ms"]
        labels = Observations.joined([piece.observations for piece in pieces])
        labels = labels.at(labels.finite)
        evidence = weigh(labels.quantity("loss"), opened.expected(labels), labels.users, self._limits)
        evidence = replace(evidence, absorbed=opened.usual_gain - float(labels.quantity("gain").mean()))
        return evidence, max(piece.record_ms for piece in pieces)

    def _circumstances(
        self, cursor: Any, case: dict[str, Any], seen: Seen, labels: int, record_ms: int
    ) -> Circumstances:
        dead, passed = (now - then for now, then in zip(self._store.letters(cursor), case["letters"], strict=True))
        rows = self._store.circumstances(cursor, record_ms=record_ms, label=seen.drift.num_fed)
        opened = seen.drift.case
        return Circumstances(
            new_labels=labels,
            days=opened.reference.days if opened else 0,
            dead_letters=dead / passed if passed else 0.0,
            gain=self._gain,
            labels_per_day=seen.mix.labels_per_day,
            blind=seen.blind,
            **rows,
        )

    def _decided(
        self, cursor: Any, decision: Decision, seen: Seen, on: tuple[Evidence | None, Circumstances, int]
    ) -> None:
        evidence, now, record_ms = on
        opened, case = seen.drift.case, self.open or {}
        inputs = {
            "series": opened.alarm.series if opened else None,
            "alarm_ms": case["record_ms"],
            "label": seen.drift.num_fed,
            "evidence": as_numbers(evidence),
            "circumstances": as_numbers(now),
            "inputs_of_users": seen.mix.report(),
        }
        found = {"inputs": inputs, "thresholds": as_numbers(self._limits)}
        self._store.note_decision(cursor, decision, (case["record_ms"], record_ms), seen.version, found)
        log.info("decided", verdict=decision.verdict, reason=decision.reason)

    def _beyond(self, window: tuple[int, int], absorbed: float) -> float:
        """What a refit saves beyond what the adapters take off the loss already."""
        return self._gain_of(window) - max(0.0, absorbed)

    def _take_answer(self) -> None:
        probe, self._probe = self._probe, None
        try:
            self._gain = probe.result() if probe else None
        except PASSING as away:
            log.warning("the probe failed, it is tried again", reason=str(away).split("\n")[0])
