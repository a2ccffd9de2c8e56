"""What a loss is expected to be: by kind of event and by hour of the day, learnt from the record itself.

A detector that sees raw losses fires every evening, and whenever there are more new users than yesterday. It is given
the residual instead: the clipped loss less what an event of its cell, at its hour, has cost so far. Pure arithmetic.

Letters: E events, C cells.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
LEARN_IN = 512  # events before anything is said of the next
FAMILIAR, LATER = 4_096, 0.25  # events after which a further one counts for less
MEMORY = 20_000.0  # events of a cell over which its mean is taken
DAYS = 7  # whose median is an hour's season: one day of drift does not become the season
_TRUST = 100.0  # events of an hour at which its mean counts for half
_CELL_TRUST = 10.0


class Expectation:
    """Means of C cells and the season of 24 hours; residuals use what was learnt before the block they are in.

    The season of an hour is the median over the last seven whole days of its mean deviation from that day, so a level
    that changes moves no season, and a day that breaks does not either.
    """

    def __init__(self, num_cells: int) -> None:
        self.means, self.counts = np.zeros(num_cells), np.zeros(num_cells)
        self.level, self.count, self.variance = 0.0, 0.0, 0.0
        self.season = np.zeros(24)
        self.day: int | None = None
        self._first_day = True
        self._days: deque[Floats] = deque(maxlen=DAYS)
        self._sums, self._numbers = np.zeros(24), np.zeros(24)

    @property
    def known(self) -> bool:
        """True once enough events were seen to expect anything."""
        return self.count >= LEARN_IN

    @property
    def days(self) -> int:
        """Whole days that the season was learnt from, at most seven."""
        return len(self._days)

    @property
    def spread(self) -> float:
        """Standard deviation of the residuals; never zero."""
        return max(float(np.sqrt(self.variance)), 1e-6)

    def of(self, cells: Ints, hours: Ints) -> Floats:
        """Expected values [E]; a cell with few events leans on the overall level."""
        shrunk = (self.means * self.counts + self.level * _CELL_TRUST) / (self.counts + _CELL_TRUST)
        expected: Floats = shrunk[cells] + self.season[hours]
        return expected

    def learn(self, values: Floats, cells: Ints, event_ms: Ints) -> None:
        """Move on past a block of events."""
        hours, day = event_ms // HOUR_MS % 24, int(event_ms.max()) // DAY_MS
        if self.day is None or day > self.day:
            self._end_day()
            self.day = day
        plain = values - self.season[hours]
        residual = values - (self.of(cells, hours) if self.count else plain.mean())
        weight = (
            1.0 if self.count < FAMILIAR else LATER
        )  # what is known well must not follow a drift before it is found
        weights = np.where(self.counts < FAMILIAR / len(self.means), 1.0, LATER)
        num = weights * np.bincount(cells, minlength=len(self.means))
        sums = weights * np.bincount(cells, plain, minlength=len(self.means))
        self.counts = np.minimum(self.counts + num, MEMORY)
        self.means += (sums - num * self.means) / np.maximum(self.counts, 1.0)
        self.count = min(self.count + weight * len(values), MEMORY)
        self.level += weight * (plain.sum() - len(values) * self.level) / self.count
        self.variance += weight * ((residual**2).sum() - len(values) * self.variance) / self.count
        # less what tells a cell from the others, but not the level: that one may be learning the hour itself
        self._sums += np.bincount(hours, values - (self.means[cells] - self.level), minlength=24)
        self._numbers += np.bincount(hours, minlength=24)

    def forget_level(self) -> None:
        """Start the means anew, after a change that is known of; the season stays."""
        self.means[:], self.counts[:] = 0.0, 0.0
        self.level, self.count, self.variance = 0.0, 0.0, 0.0

    def _end_day(self) -> None:
        """Let the day that ended speak for its hours; the first is never whole, and says nothing."""
        if self.day is not None and not self._first_day:
            mean = self._sums / np.maximum(self._numbers, 1.0)
            seen = self._numbers > 0
            deviation = np.where(seen, mean - mean[seen].mean(), 0.0)
            thin = _TRUST / (self._numbers + _TRUST)  # an hour with few events leans on its neighbours
            around = (np.roll(deviation, 1) + np.roll(deviation, -1)) / 2
            self._days.append((1 - thin) * deviation + thin * around)
            season = np.median(np.stack(self._days), 0)
            self.season = season - season.mean()
        self._first_day = self.day is None
        self._sums[:], self._numbers[:] = 0.0, 0.0

    def state(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        return {
            "means": self.means.tolist(), "counts": self.counts.tolist(), "level": self.level, "count": self.count,
            "variance": self.variance, "season": self.season.tolist(), "day": self.day, "first_day": self._first_day,
            "days": [day.tolist() for day in self._days], "sums": self._sums.tolist(),
            "numbers": self._numbers.tolist(),
        }  # fmt: skip

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Expectation:
        """What `state` described."""
        found = cls(len(state["means"]))
        found.means, found.counts = np.array(state["means"], float), np.array(state["counts"], float)
        found.level, found.count, found.variance = state["level"], state["count"], state["variance"]
        found.season, found.day, found._first_day = np.array(state["season"]), state["day"], state["first_day"]
        found._days.extend(np.array(day) for day in state["days"])
        found._sums, found._numbers = np.array(state["sums"], float), np.array(state["numbers"], float)
        return found
