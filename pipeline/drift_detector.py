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
LEAST = 5  # values on either side of a change; ADWIN looks for none between fewer
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
        """True when the series has risen, and does not lie below what was expected by two standard errors.

        While losses fall, what is expected follows late, and residuals rise again towards zero: that is no drift.
        """
        return self.after > max(self.before, -2.0 / math.sqrt(self.width))


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
                values = np.frombuffer(bytes(self._inputs), np.int8).astype(np.float64)
                return taken, means_of_parts(values * (STEP * WIDTH))
        self._inputs += piece.tobytes()
        return len(piece), None

    def _restart(self, inputs: NDArray[np.int8]) -> None:
        self._adwin = ADWIN(delta=self._delta, clock=16)
        self._inputs = bytearray(inputs.tobytes())
        for value in inputs.tolist():
            self._adwin.update(value * STEP)


def means_of_parts(values: NDArray[np.float64]) -> tuple[float, float, int]:
    """Means before and after the cut that tells most, and how many values come after it.

    What ADWIN keeps is no such part: at a change late in a long window it drops the oldest of many alike first.
    """
    late = np.arange(LEAST, len(values) - LEAST + 1)
    newest = np.cumsum(values[::-1])[late - 1]
    after, before = newest / late, (values.sum() - newest) / (len(values) - late)
    best = int(np.argmax((after - before) ** 2 / (1 / late + 1 / (len(values) - late))))
    return float(before[best]), float(after[best]), int(late[best])


def rounded(residuals: NDArray[np.float64], spread: float) -> NDArray[np.int8]:
    """Residuals in units of WIDTH standard deviations, clipped to them, as signed bytes."""
    return np.rint(np.clip(residuals / (WIDTH * spread), -1.0, 1.0) * 127).astype(np.int8)
