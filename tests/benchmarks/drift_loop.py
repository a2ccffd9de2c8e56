"""The loop closed on streams that change back and forth: alarm, evidence, probe, decision, a new fit; or a schedule.

The decision is `pipeline.drift_decision` with its default thresholds. The probe is a classifier fitted on the first
half of the labels since the alarm and judged on the second; so is the retraining, on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.drift import DriftMonitor, Observations
from pipeline.drift_decision import Circumstances, Decision, Thresholds, decide, weigh
from tests.benchmarks.drift_streams import (
    EVENTS_PER_DAY,
    GENERATORS,
    POOL,
    BinnedBayes,
    Pool,
    coins,
    daily,
    observed,
    pool,
)
from tests.benchmarks.measuring import table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PIECE = 500  # events between two looks
POISON = 0.001
LIMITS = Thresholds(cost=5.0)


@dataclass
class Watched:
    """A monitor in the loop: what it has seen since its alarm, and what it has decided."""

    monitor: DriftMonitor = field(default_factory=DriftMonitor)
    since: list[Observations] = field(default_factory=list)
    alarms: list[int] = field(default_factory=list)
    retrained: list[int] = field(default_factory=list)
    refused: int = 0

    def look(self, seen: Observations, at: int) -> bool:
        """Read a piece that ends at event `at`; True where a case is open and has more labels to weigh."""
        self.alarms += [at for alarm in self.monitor.observe(seen) if alarm.worse]
        if self.monitor.case is None:
            self.since = []
            return False
        self.since.append(seen.at(seen.finite))
        return True

    def decided(self, at: int, gain: float | None) -> Decision:
        """Decide at event `at`, and close the case unless it waits."""
        case, labels = self.monitor.case, Observations.joined(self.since)
        assert case is not None
        evidence = weigh(labels.quantity("loss"), case.expected(labels), labels.users, LIMITS)
        since = at - self.retrained[-1] if self.retrained else None
        now = Circumstances(
            new_labels=len(labels),
            days=case.reference.days,
            seconds_since=None if since is None else since * 86_400 / EVENTS_PER_DAY,
            labels_since=since,
            retrained_today=sum(at - place < EVENTS_PER_DAY for place in self.retrained),
            gain=gain,
            labels_per_day=EVENTS_PER_DAY,
        )
        decision = decide(evidence, now, LIMITS)
        if decision.verdict == "retrain":
            self.retrained.append(at)
            self.monitor.restart()
        if decision.verdict == "no":
            self.refused += 1
            self.monitor.close_case()
        return decision


@dataclass(frozen=True)
class Ran:
    """One policy on one stream: mean error, places of new fits, share of the switches that an alarm followed."""

    error: float
    fits: int
    found: float


def alternating(generator: str, switches: int, length: int, rng: np.random.Generator) -> Pool:
    """A stream that goes from one concept to the other every `length` events."""
    concepts = np.repeat(np.arange(switches + 1) % 2, length)
    rows = rng.integers(0, POOL, len(concepts))
    first, second = pool(generator, 0), pool(generator, 1)
    features = np.where(concepts[:, None] == 0, first.features[rows], second.features[rows])
    return Pool(features, np.where(concepts == 0, first.classes[rows], second.classes[rows]))


def by_monitor(stream: Pool, length: int, rng: np.random.Generator) -> Ran:
    """Fit anew where the monitor decides to."""
    model, watched, errors = _first_fit(stream), Watched(), np.zeros(len(stream.classes))
    opened = 0
    for start in range(0, len(errors), PIECE):
        now = slice(start, start + PIECE)
        errors[now] = model.errors(stream.features[now], stream.classes[now])
        at = start + PIECE
        open_before = watched.monitor.case is not None
        if not watched.look(observed(errors[now], rng, first=start, poison=POISON), at):
            continue
        opened = opened if open_before else start
        if watched.decided(at, _probe(stream, errors, opened, at)).verdict == "retrain":
            model = BinnedBayes(stream.features[opened + PIECE : at], stream.classes[opened + PIECE : at])
    switches = range(length, len(errors), length)
    found = [any(place < alarm <= place + length for alarm in watched.alarms) for place in switches]
    return Ran(float(errors.mean()), len(watched.retrained), float(np.mean(found)))


def by_schedule(stream: Pool, fits: int, rng: np.random.Generator) -> Ran:
    """Fit anew so many times, evenly spread from a random place on, each on the labels that a retraining would need."""
    model, errors = _first_fit(stream), np.zeros(len(stream.classes))
    phase = rng.random()
    places = [int(len(errors) * (number + phase) / fits) for number in range(fits)]
    for start, end in zip([0, *places], [*places, len(errors)], strict=True):
        if start >= LIMITS.new_labels:
            known = slice(max(0, start - LIMITS.new_labels), start)
            model = BinnedBayes(stream.features[known], stream.classes[known])
        errors[start:end] = model.errors(stream.features[start:end], stream.classes[start:end])
    return Ran(float(errors.mean()), fits, 0.0)


def _first_fit(stream: Pool) -> BinnedBayes:
    return BinnedBayes(stream.features[:5000], stream.classes[:5000])


def _probe(stream: Pool, errors: Floats, opened: int, at: int) -> float | None:
    if at - opened < LIMITS.new_labels:
        return None
    middle = (opened + at) // 2
    refit = BinnedBayes(stream.features[opened:middle], stream.classes[opened:middle])
    return float((errors[middle:at] - refit.errors(stream.features[middle:at], stream.classes[middle:at])).mean())


def retrainings_without_drift(rates: Floats, rng: np.random.Generator) -> tuple[int, int]:
    """(alarms, retrainings) on coins that do not change, with a probe that always promises a gain."""
    watched = Watched()
    for start in range(0, len(rates), PIECE):
        piece = observed(coins(rates[start : start + PIECE], rng), rng, first=start, poison=POISON)
        if watched.look(piece, start + PIECE):
            watched.decided(start + PIECE, 1.0)
    return len(watched.alarms), len(watched.retrained)


def report(*, quick: bool) -> str:
    """Both tables."""
    return "\n".join([_without_drift(quick=quick), _recurring(quick=quick)])


def _without_drift(*, quick: bool) -> str:
    streams, length = (1, 50_000) if quick else (3, 1_000_000)
    rows = []
    for name in ("coin .20", "coin .20, ±50 % a day"):
        counts = np.zeros(2)
        for seed in range(streams):
            rates = np.full(length, 0.2)
            rng = np.random.default_rng(900 + seed)
            counts += retrainings_without_drift(daily(rates) if "day" in name else rates, rng)
        alarms, fits = (f"{1e4 * count / (streams * length):.4f}" for count in counts)
        rows.append([name, f"{streams * length:,}", alarms, fits])
    columns = ("stream", "events", "alarms / 10k", "retrainings / 10k")
    return table("Decisions without drift (the probe always promises a gain)", columns, rows)


def _recurring(*, quick: bool) -> str:
    rows = []
    for generator in GENERATORS:
        ran: dict[str, list[Ran]] = {"monitor": [], "schedule": [], "never": []}
        for seed in range(1 if quick else 10):
            rng = np.random.default_rng(seed)
            stream = alternating(generator, 2 if quick else 6, 20_000, rng)
            ran["monitor"].append(by_monitor(stream, 20_000, rng))
            ran["schedule"].append(by_schedule(stream, ran["monitor"][-1].fits, rng))
            ran["never"].append(by_schedule(stream, 0, rng))
        errors = [f"{np.mean([one.error for one in policy]):.4f}" for policy in ran.values()]
        fits, found = (np.mean([getattr(one, name) for one in ran["monitor"]]) for name in ("fits", "found"))
        rows.append([generator, f"{found:.1%}", f"{fits:.1f}", *errors])
    columns = ("recurring", "switches found", "retrainings", "error, monitor", "error, every N", "error, never")
    return table("Six switches 20,000 events apart; every N retrains as often, from a random place on", columns, rows)
