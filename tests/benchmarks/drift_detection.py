"""`make bench-drift`: the monitor's arithmetic beside River's detectors used plainly, and beside a schedule.

The monitor is the one of the live path (`pipeline.drift`, `pipeline.drift_decision`), fed with NaN, infinities and
1e308 among its losses; the plain detectors are fed without them, since one NaN ends them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray
from river import drift

from pipeline.drift import DriftMonitor
from tests.benchmarks import drift_loop
from tests.benchmarks.drift_streams import GENERATORS, coins, daily, errors_of, observed, rotating
from tests.benchmarks.measuring import table

Floats = NDArray[np.float64]
Run = Callable[[Floats, np.random.Generator], list[int]]
POISON = 0.001
MISSED = 10**9
KSWIN_STREAMS = 4  # a third of a millisecond an event


@dataclass(frozen=True)
class Trial:
    """Streams of one kind: `change` is where they get worse, None where they never do."""

    name: str
    streams: int
    change: int | None
    draw: Callable[[np.random.Generator, int], Floats]


@dataclass
class Found:
    """What a detector said over the streams of a trial."""

    events: int = 0
    early: int = 0
    delays: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> list[str]:
        """False alarms per 10,000, delay p50 and p95, missed, microseconds an event."""
        cost = f"{1e6 * self.seconds / max(self.total, 1):.1f}"
        false = f"{1e4 * self.early / max(self.events, 1):.3f}"
        if not self.delays:
            return [false, "", "", "", cost]
        missed = sum(delay == MISSED for delay in self.delays)
        quantiles = [int(np.quantile(self.delays, q, method="higher")) for q in (0.5, 0.95)]
        shown = ["—" if value == MISSED else f"{value:,}" for value in quantiles]
        return [false, *shown, f"{missed} of {len(self.delays)}", cost]

    total: int = 0


def trials(*, quick: bool) -> list[Trial]:
    """All kinds of streams; quick ones are few and mean little."""
    few = 20 if quick else 1

    def share(streams: int) -> int:
        return max(2, streams // few)

    def step(before: int, after: int, low: float, high: float, ramp: int = 0) -> Floats:
        parts = np.full(before, low), np.linspace(low, high, ramp), np.full(after, high)
        return np.concatenate(parts)

    def still(rng: np.random.Generator, _: int) -> Floats:
        return coins(np.full(100_000, 0.2), rng)

    def cycle(rng: np.random.Generator, _: int) -> Floats:
        return coins(daily(np.full(300_000, 0.2)), rng)

    found = [
        Trial("coin .20, no drift", share(30), None, still),
        Trial("coin .20, ±50 % a day, no drift", share(10), None, cycle),
        Trial("coin .20 → .40", share(300), 20_000, lambda rng, _: coins(step(20_000, 2_500, 0.2, 0.4), rng)),
        Trial("coin .20 → .25", share(300), 20_000, lambda rng, _: coins(step(20_000, 8_000, 0.2, 0.25), rng)),
        Trial("coin .20 → .40 over 2,000", share(100), 10_000,
              lambda rng, _: coins(step(10_000, 2_000, 0.2, 0.4, 2_000), rng)),
        Trial("coin .20 → .40, ±50 % a day", share(60), 50_000,
              lambda rng, _: coins(daily(step(50_000, 3_000, 0.2, 0.4)), rng)),
    ]  # fmt: skip
    for name in GENERATORS:
        found += [
            Trial(f"{name}, abrupt", share(100), 8_000, partial(_concepts, name, 0)),
            Trial(f"{name}, over 2,000", share(100), 8_000, partial(_concepts, name, 2_000)),
        ]
    turning = Trial("Hyperplane, rotating", share(40), 6_000, lambda _, seed: rotating(seed, 6_000, 4_000))
    return [*found, turning]


def _concepts(generator: str, ramp: int, rng: np.random.Generator, _: int) -> Floats:
    share = np.concatenate([np.zeros(8_000), np.linspace(0, 1, ramp), np.ones(4_000)])
    return errors_of(generator, (rng.random(len(share)) < share).astype(np.int64), rng)


def monitor(loss: Floats, rng: np.random.Generator) -> list[int]:
    """Places at which the monitor says that something is worse, over all or in a segment."""
    watched = DriftMonitor()
    poisoned = observed(loss, rng, poison=POISON)
    places = np.flatnonzero(poisoned.finite)
    return [int(places[alarm.at]) for alarm in watched.observe(poisoned) if alarm.worse]


def plainly(make: Callable[[], drift.ADWIN]) -> Run:
    """A detector of River on the bare losses; whatever it says is an alarm."""

    def run(loss: Floats, _: np.random.Generator) -> list[int]:
        detector, found = make(), []
        for place, value in enumerate(loss.tolist()):
            detector.update(value)
            if detector.drift_detected:
                found.append(place)
        return found

    return run


DETECTORS: dict[str, Run] = {
    "**monitor** (poisoned)": monitor,
    "ADWIN": plainly(drift.ADWIN),
    "PageHinkley (up)": plainly(lambda: drift.PageHinkley(mode="up")),
    "HDDM_A": plainly(drift.binary.HDDMA),
    "HDDM_W": plainly(drift.binary.HDDMW),
    "KSWIN": plainly(lambda: drift.KSWIN(seed=0)),
}


def measured(trial: Trial, run: Run, streams: int) -> Found:
    """Let a detector run over a trial's streams."""
    found = Found()
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        loss = trial.draw(rng, seed)
        began = time.process_time()
        alarms = run(loss, rng)
        found.seconds += time.process_time() - began
        found.total += len(loss)
        change = len(loss) if trial.change is None else trial.change
        found.events += change
        found.early += sum(place < change for place in alarms)
        if trial.change is not None:
            later = [place for place in alarms if place >= change]
            found.delays.append(later[0] + 1 - change if later else MISSED)
    return found


def rows(*, quick: bool) -> Iterator[list[str]]:
    """One line for each trial and detector."""
    for trial in trials(quick=quick):
        for name, run in DETECTORS.items():
            if name == "KSWIN" and (quick or trial.change is None or trial.change > 20_000):
                continue
            streams = min(trial.streams, KSWIN_STREAMS) if name == "KSWIN" else trial.streams
            yield [trial.name, name, str(streams), *measured(trial, run, streams).row()]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute instead of many; the figures mean little")
    quick = parser.parse_args().quick
    columns = ("stream", "detector", "streams", "false / 10k", "delay p50", "p95", "missed", "µs an event")
    print(table("Alarms", columns, list(rows(quick=quick))), flush=True)
    print(drift_loop.report(quick=quick), flush=True)


if __name__ == "__main__":
    main()
