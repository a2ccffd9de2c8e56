"""What a stream earned, from the rows of `prequential`: hit rates, losses, and the gain with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("adapted", "start", "popular")
RESAMPLES = 2000


@dataclass
class Score:
    """Hits and losses of some users' events, added up as batches arrive.

    An event is a hit when the item that came next stood within the first `k` of the list made before it.
    Rank 0 says that the item had no vector: a miss for every list.
    """

    users: frozenset[str] | None = None
    k: int = 10
    num_events: int = 0
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    by_user: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def add(
        self, user_ids: Sequence[str], ranks: Mapping[str, Sequence[int]], losses: Mapping[str, Sequence[float]]
    ) -> None:
        """Add the events of one batch that belong to `users` (None: everybody)."""
        counted = [at for at, user in enumerate(user_ids) if self.users is None or user in self.users]
        self.num_events += len(counted)
        for at in counted:
            hit = {kind: 1 <= ranks[kind][at] <= self.k for kind in KINDS}
            for kind in KINDS:
                self.hits[kind] += hit[kind]
            # events, hits adapted − start, hits adapted − popular, loss start − adapted
            gains = (
                1,
                hit["adapted"] - hit["start"],
                hit["adapted"] - hit["popular"],
                losses["start"][at] - losses["adapted"][at],
            )
            self.by_user[user_ids[at]] = self.by_user.get(user_ids[at], np.zeros(4)) + gains

    def rate(self, kind: str) -> float:
        """Return the hit rate of one list."""
        return self.hits[kind] / self.num_events if self.num_events else 0.0


@dataclass(frozen=True)
class Gain:
    """A mean gain per event, with its 95 % bootstrap interval over users."""

    mean: float
    low: float
    high: float


def gains(score: Score, seed: int) -> dict[str, Gain]:
    """Return the gains per event, resampling whole users (their events are not independent).

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap": the percentile interval of a ratio of sums.
    """
    rows = np.array([score.by_user[user] for user in sorted(score.by_user)])
    names = ("hit_rate_over_start", "hit_rate_over_popular", "loss_under_start")
    if not len(rows):
        return {}
    drawn = np.random.default_rng(seed).integers(0, len(rows), (RESAMPLES, len(rows)))
    sums = np.stack([rows[pick].sum(0) for pick in drawn])
    means = sums[:, 1:] / sums[:, :1]
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    mean = rows.sum(0)[1:] / rows.sum(0)[0]
    return {name: Gain(float(mean[at]), float(low[at]), float(high[at])) for at, name in enumerate(names)}


def choose_user(events: Iterable[dict[str, Any]], candidates: frozenset[str], seed: int) -> str:
    """Pick the user to show: one of those with 25 to 100 events, by the seed."""
    counts: dict[str, int] = {}
    for event in events:
        if event["user_id"] in candidates:
            counts[event["user_id"]] = counts.get(event["user_id"], 0) + 1
    fitting = sorted(user for user, count in counts.items() if 25 <= count <= 100) or sorted(counts)
    return fitting[int(np.random.default_rng(seed).integers(len(fitting)))]
