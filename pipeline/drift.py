"""Drift in the prequential record: residuals by segment go through detectors; what is worse is an alarm.

Pure: arrays in, alarms out, no clock and no connection. Whatever the pieces the record arrives in, the same events in
the same order give the same alarms and the same state.

Two quantities are watched: `loss`, under the live adapter, and `gain`, the loss under the adapter less the loss
under the un-adapted start of the same event; a gain that rises towards zero says that adaptation earns less.

Letters: E events.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.drift_detector import Detector, rounded
from pipeline.drift_expectation import HOUR_MS, Expectation
from schemas.event_types import NAMES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BLOCK = 128  # events whose expectation is taken from what went before them
LARGEST_LOSS = 20.0
BUCKET_STARTS = (1, 3, 6, 11, 21, 51, 101)  # support sizes, as the model's own buckets
MOST_SCENES = 8
QUANTITIES = ("loss", "gain")


@dataclass(frozen=True, slots=True)
class Observations:
    """Events of the record as columns [E], in the order in which they are read.

    Attributes:
        loss, start: −log probability under the live adapter and under the un-adapted start.
        num_events: support size K before the event.
        new_items: the version never saw the item.
        scenes: names, "" where the event has none.
        users: a hash of each user.

    """

    loss: Floats
    start: Floats
    event_ms: Ints
    num_events: Ints
    types: Ints
    new_items: Bools
    scenes: NDArray[np.str_]
    users: Ints
    items: Ints

    def __len__(self) -> int:
        return len(self.loss)

    def at(self, chosen: slice | Ints | Bools) -> Observations:
        """These events of them."""
        return Observations(*(getattr(self, column.name)[chosen] for column in fields(self)))

    @classmethod
    def joined(cls, parts: list[Self]) -> Observations:
        """Several pieces, one after the other."""
        return Observations(*(np.concatenate([getattr(part, c.name) for part in parts]) for c in fields(cls)))

    @property
    def finite(self) -> Bools:
        """Which events have a loss that means something."""
        with np.errstate(invalid="ignore"):
            usable: Bools = np.isfinite(self.loss) & np.isfinite(self.start)
            return usable & (np.maximum(np.abs(self.loss), np.abs(self.start)) < 1e6)

    def quantity(self, name: str) -> Floats:
        """`loss`, or `gain` = loss − start; both of clipped losses."""
        loss, start = (np.clip(column, 0.0, LARGEST_LOSS) for column in (self.loss, self.start))
        chosen: Floats = loss if name == "loss" else loss - start
        return chosen

    @property
    def cells(self) -> Ints:
        """The kind of each event that its expectation is taken from: support size × known or new item."""
        return np.digitize(self.num_events, BUCKET_STARTS) * 2 + self.new_items

    @property
    def hours(self) -> Ints:
        """Hour of the day, UTC, of the events' own time."""
        return self.event_ms // HOUR_MS % 24


NUM_CELLS = 2 * (len(BUCKET_STARTS) + 1)


@dataclass(frozen=True, slots=True)
class Alarm:
    """A change for the worse, in standard deviations of the residual; `at` counts the events fed since the start."""

    series: str
    at: int
    before: float
    after: float
    width: int
    worse: bool


@dataclass(frozen=True, slots=True)
class Case:
    """What the first alarm for the worse opened: the alarm, the loss that was expected, and the gain, before it."""

    alarm: Alarm
    reference: Expectation
    usual_gain: float

    def expected(self, observations: Observations) -> Floats:
        """The loss to be expected of these events, had nothing changed. [E]"""
        return self.reference.of(observations.cells, observations.hours)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        kept = {"alarm": asdict(self.alarm), "reference": self.reference.state()}
        return kept | {"usual_gain": self.usual_gain}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """ADWIN's significance over all events and within one segment, and the residuals it remembers of each."""

    overall: float = 0.005
    segment: float = 0.0005
    window: int = 16_384
    segment_window: int = 4_096


class DriftMonitor:
    """Everything that is remembered of a record between two pieces of it."""

    def __init__(self, sensitivity: Sensitivity | None = None) -> None:
        self.sensitivity = sensitivity or Sensitivity()
        self.expectations = {name: Expectation(NUM_CELLS) for name in QUANTITIES}
        self.detectors: dict[str, Detector] = {}
        self.scenes: list[str] = []
        self.num_fed = 0
        self.num_unusable = 0
        self._block: list[Observations] = []  # what was fed of the current block
        self._in_block = 0
        self._changed: set[str] = set()  # quantities whose level changed within it
        self.case: Case | None = None

    def observe(self, observations: Observations) -> list[Alarm]:
        """Read on; gives the changes found, improvements (`worse` False) among them."""
        usable = observations.finite
        self.num_unusable += int((~usable).sum())
        if not usable.all():
            observations = observations.at(usable)
        alarms: list[Alarm] = []
        start = 0
        while start < len(observations):
            piece = observations.at(slice(start, start + BLOCK - self._in_block))
            start += len(piece)
            alarms += self._feed(piece)
        return alarms

    def restart(self) -> None:
        """Another version is live: its level is its own. The seasons stay."""
        for expectation in self.expectations.values():
            expectation.forget_level()
        self.detectors = {}
        self._block, self._in_block, self._changed = [], 0, set()
        self.case = None

    def close_case(self) -> None:
        """The alarm was decided upon; the next one opens a case of its own."""
        self.case = None

    def _feed(self, piece: Observations) -> list[Alarm]:
        alarms: list[Alarm] = []
        cells, hours = piece.cells, piece.hours
        for quantity, expectation in self.expectations.items():
            if not expectation.known:
                continue
            residual = piece.quantity(quantity) - expectation.of(cells, hours)
            values = rounded(residual, expectation.spread)
            for series, members in self._series(piece, quantity):
                alarms += self._detect(series, values, members)
        self.num_fed += len(piece)
        # Only what is learnt from when the block ends: saved rows must not tell who was in it, also of the forgotten.
        self._block.append(replace(piece, users=np.zeros_like(piece.users), items=np.zeros_like(piece.items)))
        self._in_block += len(piece)
        self._changed |= {alarm.series for alarm in alarms} & set(QUANTITIES)
        worse = [alarm for alarm in alarms if alarm.worse]
        if worse and self.case is None:
            reference = Expectation.restore(self.expectations["loss"].state())
            self.case = Case(worse[0], reference, self.expectations["gain"].level)
        if self._in_block == BLOCK:
            self._learn()
        return alarms

    def _learn(self) -> None:
        """End the block. Where a level has changed, what follows is measured against the new one."""
        for quantity in self._changed:
            self.expectations[quantity].forget_level()
            self.detectors = {s: d for s, d in self.detectors.items() if quantity == "gain" and s != "gain"}
        self._changed = set()
        block = Observations.joined(self._block)
        for quantity, expectation in self.expectations.items():
            expectation.learn(block.quantity(quantity), block.cells, block.event_ms)
        self._block, self._in_block = [], 0

    def _detect(self, series: str, values: NDArray[np.int8], members: Bools | None) -> list[Alarm]:
        if series not in self.detectors:
            overall = series in QUANTITIES
            s = self.sensitivity
            self.detectors[series] = Detector(
                s.overall if overall else s.segment, s.window if overall else s.segment_window
            )
        mine = values if members is None else values[members]
        places = None if members is None else np.flatnonzero(members)
        return [
            Alarm(
                series,
                self.num_fed + int(change.place if places is None else places[change.place]),
                change.before,
                change.after,
                change.width,
                change.worse,
            )
            for change in self.detectors[series].feed(mine)
        ]

    def _series(self, piece: Observations, quantity: str) -> list[tuple[str, Bools | None]]:
        """Over all events, and for the loss each segment with events in this piece."""
        found: list[tuple[str, Bools | None]] = [(quantity, None)]
        if quantity != "loss":
            return found
        buckets = np.digitize(piece.num_events, BUCKET_STARTS)
        found += [(f"support:{low_of(int(b))}", buckets == b) for b in np.unique(buckets)]
        found += [(f"type:{NAMES[code]}", piece.types == code) for code in np.unique(piece.types)]
        if piece.new_items.any():
            found.append(("new_items", piece.new_items))
        for scene in np.unique(piece.scenes).tolist():
            if scene and scene not in self.scenes and len(self.scenes) < MOST_SCENES:
                self.scenes.append(scene)
            if scene in self.scenes:
                found.append((f"scene:{scene}", piece.scenes == scene))
        return found

    def state(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Numbers, and each detector's inputs."""
        block = Observations.joined(self._block) if self._block else None
        numbers = {
            "expectations": {name: expectation.state() for name, expectation in self.expectations.items()},
            "scenes": self.scenes,
            "num_fed": self.num_fed,
            "num_unusable": self.num_unusable,
            "changed": sorted(self._changed),
            "case": self.case.state() if self.case else None,
            "block": {c.name: getattr(block, c.name).tolist() for c in fields(block)} if block else None,
        }
        return numbers, {series: detector.inputs for series, detector in self.detectors.items()}

    @classmethod
    def restore(
        cls, numbers: dict[str, Any], inputs: dict[str, bytes], sensitivity: Sensitivity | None = None
    ) -> DriftMonitor:
        """What `state` described."""
        found = cls(sensitivity)
        found.expectations = {name: Expectation.restore(numbers["expectations"][name]) for name in QUANTITIES}
        found.scenes, found.num_fed = list(numbers["scenes"]), numbers["num_fed"]
        found.num_unusable, found._changed = numbers["num_unusable"], set(numbers["changed"])
        s = found.sensitivity
        for series, kept in inputs.items():
            overall = series in QUANTITIES
            delta, window = (s.overall, s.window) if overall else (s.segment, s.segment_window)
            found.detectors[series] = Detector(delta, window, kept)
        if case := numbers["case"]:
            reference = Expectation.restore(case["reference"])
            found.case = Case(Alarm(**case["alarm"]), reference, case["usual_gain"])
        if numbers["block"]:
            kinds = {"scenes": np.str_, "new_items": np.bool_, "loss": np.float64, "start": np.float64}
            columns: dict[str, Any] = {
                name: np.array(rows, kinds.get(name, np.int64)) for name, rows in numbers["block"].items()
            }
            found._block, found._in_block = [Observations(**columns)], len(columns["loss"])
        return found


def low_of(bucket: int) -> int:
    """The smallest support size of a bucket, which names it."""
    return (0, *BUCKET_STARTS)[bucket]
