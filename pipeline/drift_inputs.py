"""What users do, against what they did before: item mix, share of new items, kinds of events.

Reported, and never by itself a reason to train again: users who do other things under the same loss are served as
well as before. Pure.

Letters: E events, B bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.event_types import NAMES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 64  # items share bins, so that the distance of two samples of one mix stays small
RECENT, USUAL = 2_000.0, 50_000.0  # labels over which the two averages are taken
_EVEN = 1e-4  # probability that every bin has at least


class InputMix:
    """Two decaying averages of what was done: the usual one and the recent one."""

    def __init__(self) -> None:
        self._sums = {"recent": self._none(), "usual": self._none()}
        self.num_labels = 0
        self._newest_ms: int | None = None

    @staticmethod
    def _none() -> dict[str, Floats]:
        return {"items": np.zeros(BINS), "new": np.zeros(2), "types": np.zeros(len(NAMES)), "time": np.zeros(2)}

    def add(self, items: Ints, new_items: NDArray[np.bool_], applied_types: Ints, event_ms: Ints) -> None:
        """Count the labels of a piece [E], and all events that were applied with them by type."""
        if not len(items):
            return
        self.num_labels += len(items)
        # One clock for all partitions: pieces of several tell the same hours, and pieces of one label none.
        newest = max(int(event_ms.max()), self._newest_ms or 0)
        passed = newest - (int(event_ms.min()) if self._newest_ms is None else self._newest_ms)
        self._newest_ms = newest
        seen = {
            "items": np.bincount(items % BINS, minlength=BINS),
            "new": np.array([new_items.sum(), len(items)]),
            "types": applied_types,
            "time": np.array([len(items), passed / 3_600_000]),
        }
        for name, memory in (("recent", RECENT), ("usual", USUAL)):
            kept = 0.5 ** (len(items) / memory)
            sums = self._sums[name]
            self._sums[name] = {key: sums[key] * kept + value for key, value in seen.items()}

    def report(self) -> dict[str, Any]:
        """Plain numbers: the distance of the item mixes (population stability index), shares and rates of both."""
        usual, recent = self._sums["usual"], self._sums["recent"]
        return {
            "item_mix_distance": round(_distance(usual["items"], recent["items"]), 4),
            "new_items": _pair(usual["new"], recent["new"]),
            "labels_per_hour": _pair(usual["time"], recent["time"]),
            "types": {
                name: [round(float(share), 4) for share in pair]
                for name, *pair in zip(NAMES, _shares(usual["types"]), _shares(recent["types"]), strict=True)
                if any(pair)
            },
        }

    @property
    def labels_per_day(self) -> float:
        """How many labels a day of event time usually brings; 0 before there were any."""
        labels, hours = self._sums["usual"]["time"]
        return float(24 * labels / hours) if hours > 0 else 0.0

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        sums = {name: {key: value.tolist() for key, value in kept.items()} for name, kept in self._sums.items()}
        return {"num_labels": self.num_labels, "newest_ms": self._newest_ms, "sums": sums}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> InputMix:
        """What `state` described."""
        found = cls()
        found.num_labels, found._newest_ms = state["num_labels"], state.get("newest_ms")
        found._sums = {
            name: {key: np.array(value, float) for key, value in kept.items()} for name, kept in state["sums"].items()
        }
        return found


def _shares(counts: Floats) -> Floats:
    shares: Floats = counts / max(float(counts.sum()), 1e-9)
    return shares


def _pair(usual: Floats, recent: Floats) -> list[float]:
    return [round(float(part[0] / part[1]), 4) if part[1] > 0 else 0.0 for part in (usual, recent)]


def _distance(usual: Floats, recent: Floats) -> float:
    """Population stability index Σ (p − q) ln (p / q); .1 is little, .25 is much."""
    if not usual.sum() or not recent.sum():
        return 0.0
    p, q = (np.maximum(_shares(counts), _EVEN) for counts in (usual, recent))
    return float(((p - q) * np.log(p / q)).sum())
