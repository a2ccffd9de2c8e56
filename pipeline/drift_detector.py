"""River's ADWIN over one series of residuals, with a state of plain bytes.

River's detector lives in Rust and cannot be written to a database. It is a function of what it was fed, though: the
residuals are rounded to one byte each, and at most 2 x WINDOW of them are kept, so that feeding them again gives the
very detector. The window is cut while running too, at the same counts, so a monitor that was killed and one that was
not say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from river.drift import ADWIN

STEP = 1 / 127
LEAST = 5  # values on either side of a change: ADWIN compares no fewer
WIDTH = 3.0  # standard deviations of a residual that fill the range of ADWIN


@dataclass(frozen=True, slots=True)
class Change:
    """A change in the mean of a series, found `place` events into what was fed, `width` events after it began.

    Means are in standard deviations.
    """

    place: int
    before: float
    after: float
    width: int

    @property
    def worse(self) -> bool:
        """True when the series has risen, and lies above what was expected by two standard errors.

        While losses fall, what is expected follows late, and residuals rise again towards zero: that is no drift.
        """
        return self.after > max(self.before, 2.0 / math.sqrt(self.width))


class Detector:
    """ADWIN with a bounded, exact memory."""

    def __init__(self, delta: float, window: int, inputs: bytes = b"") -> None:
        self._delta, self._window = delta, window
        self._restart(np.frombuffer(inputs, np.int8))

    @property
    def inputs(self) -> bytes:
        """What to restore it from."""
        return bytes(self._inputs)

    def feed(self, values: NDArray[np.int8]) -> list[Change]:
        """Take rounded residuals (`rounded`) and give the changes among them."""
        changes: list[Change] = []
        start = 0
        while start < len(values):
            piece = values[start : start + 2 * self._window - len(self._inputs)]
            taken, change = self._take(piece)
            start += taken
            if change is not None:
                changes.append(Change(start - 1, *change))
                self._restart(piece[:0])
            elif len(self._inputs) >= 2 * self._window:
                self._restart(np.frombuffer(bytes(self._inputs[-self._window :]), np.int8))
        return changes

    def _take(self, piece: NDArray[np.int8]) -> tuple[int, tuple[float, float, int] | None]:
        adwin, update = self._adwin, self._adwin.update
        for taken, value in enumerate(piece.tolist(), 1):
            update(value * STEP)
            if adwin.drift_detected:
                self._inputs += piece[:taken].tobytes()
                known = np.frombuffer(bytes(self._inputs), np.int8).astype(np.float64) * (STEP * WIDTH)
                return taken, around_change(known, int(adwin.width))
        self._inputs += piece.tobytes()
        return len(piece), None

    def _restart(self, inputs: NDArray[np.int8]) -> None:
        self._adwin = ADWIN(delta=self._delta, clock=16)
        self._inputs = bytearray(inputs.tobytes())
        for value in inputs.tolist():
            self._adwin.update(value * STEP)


def around_change(values: NDArray[np.float64], kept: int) -> tuple[float, float, int]:
    """Means before and after a change, and how many values came after it, where ADWIN has kept so many of the newest.

    What it dropped is old, what it kept need not be new: late in a long window the oldest of many alike go first. The
    change lies where, of all that was kept, the means of old and new differ most for their standard error.
    """
    new = np.arange(LEAST, min(kept, len(values) - LEAST) + 1)
    sums = np.cumsum(values[::-1])[new - 1]
    old, after = len(values) - new, sums / new
    before = (values.sum() - sums) / old
    most = int(np.argmax((after - before) ** 2 / (1 / new + 1 / old)))
    return float(before[most]), float(after[most]), int(new[most])


def rounded(residuals: NDArray[np.float64], spread: float) -> NDArray[np.int8]:
    """Residuals in units of WIDTH standard deviations, clipped to them, as signed bytes."""
    return np.rint(np.clip(residuals / (WIDTH * spread), -1.0, 1.0) * 127).astype(np.int8)
