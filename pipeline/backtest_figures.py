"""From ranks to figures with intervals: means over users, by bucket of K, paired between recommenders.

A user counts once; intervals are percentile bootstraps over users (Efron and Tibshirani 1993), comparisons are paired.
Letters: E judged events, Q query slots, k list slots, U users, M metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.figures import Interval, set_ndcg
from pipeline.support import Ints

Floats = NDArray[np.float64]

METRICS = ("set_ndcg", "set_recall", "hit", "ndcg", "mrr")
BUCKETS = ((0, 0), (1, 2), (3, 5), (6, 10), (11, 20), (21, 50), (51, 100), (101, 2**62))
LABELS = ("0", "1-2", "3-5", "6-10", "11-20", "21-50", "51-100", ">100")
CUTOFF = 10
DRAWS, SEED = 2000, 1


@dataclass(frozen=True)
class Judged:
    """What one recommender said before E events: ranks [E, Q] of the items to come (0 = none), lists [E, k] (-1)."""

    ranks: NDArray[np.float32]
    lists: Ints

    def metrics(self) -> Floats:
        """METRICS of every event: [E, M]."""
        return event_metrics(self.ranks)


@dataclass(frozen=True)
class Row:
    """Interval of every metric over the users of a bucket or segment, and how many they are."""

    label: str
    num_users: int
    metrics: dict[str, Interval]


def event_metrics(ranks: NDArray[np.float32]) -> Floats:
    """Set nDCG@10, set recall@10, and of the next item hit@10, nDCG@10 and MRR: [E, M] from ranks [E, Q]."""
    wide = torch.from_numpy(ranks).double()
    own = wide[:, 0].numpy()
    inside = (wide > 0) & (wide <= CUTOFF)
    recall = inside.sum(1) / (wide > 0).sum(1).clamp(1, CUTOFF)
    hit = (own > 0) & (own <= CUTOFF)
    gain = np.where(hit, 1 / np.log2(1 + np.maximum(own, 1)), 0.0)
    reciprocal = np.where(own > 0, 1 / np.maximum(own, 1), 0.0)
    return np.stack([set_ndcg(wide).numpy(), recall.numpy(), hit.astype(float), gain, reciprocal], 1)


def user_means(values: Floats, users: Ints) -> Floats:
    """Mean of each user's events [U, M], users ascending."""
    _, number, counts = np.unique(users, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(number, column, minlength=len(counts)) for column in values.T], 1)
    means: Floats = sums / counts[:, None]
    return means


def bootstrap(values: Floats, *, draws: int = DRAWS, seed: int = SEED) -> list[Interval]:
    """Means over users of values [U, M] with their 95 % intervals; zeros without users."""
    if not len(values):
        return [Interval(0.0, 0.0, 0.0)] * values.shape[1]
    chosen = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    rows = []
    for column in values.T:
        low, high = np.percentile(column[chosen].mean(1), [2.5, 97.5])
        rows.append(Interval(float(column.mean()), float(low), float(high)))
    return rows


def row(label: str, values: Floats, users: Ints) -> Row:
    """Figures of some events: metrics (or differences of them) [E, M] of users [E]."""
    means = user_means(values, users) if len(users) else np.zeros((0, len(METRICS)))
    return Row(label, len(means), dict(zip(METRICS, bootstrap(means), strict=True)))


def by_bucket(values: Floats, users: Ints, num_events: Ints) -> list[Row]:
    """One row per bucket of K that has events."""
    rows = []
    for label, (low, high) in zip(LABELS, BUCKETS, strict=True):
        mine = (num_events >= low) & (num_events <= high)
        if mine.any():
            rows.append(row(label, values[mine], users[mine]))
    return rows


def compared(ahead: Interval, other: str) -> str:
    """Ahead of the other, behind it or neither, with the difference and its interval."""
    verb = "ahead of" if ahead.low > 0 else "behind" if ahead.high < 0 else "not to be told from"
    return f"{verb} {other}: {ahead.mean:+.4f} [{ahead.low:+.4f}, {ahead.high:+.4f}]"


def coverage(lists: Ints, num_items: int) -> float:
    """Share of the catalogue that stands in any list."""
    return len(np.unique(lists[lists >= 0])) / max(num_items, 1)


def gini(lists: Ints, num_items: int) -> float:
    """How unequal the items' places in lists are: 0 all alike, 1 one item takes all."""
    counts = np.sort(np.bincount(lists[lists >= 0], minlength=num_items)).astype(float)
    total = counts.sum()
    if not total:
        return 0.0
    place = np.arange(1, num_items + 1)
    return float((2 * place - num_items - 1) @ counts / (num_items * total))


def novelty(lists: Ints, popularity: Floats) -> float:
    """Mean surprise of listed items in bits: -log2 of their share of the fitted events."""
    share = (popularity + 1) / (popularity + 1).sum()
    return float(-np.log2(share[lists[lists >= 0]]).mean()) if (lists >= 0).any() else 0.0


def diversity(lists: Ints, embeddings: NDArray[np.float32]) -> float:
    """1 - mean cosine between the texts of two items of the same list."""
    shown = np.where((lists >= 0)[..., None], embeddings[np.maximum(lists, 0)], 0.0)
    size = (np.square(shown).sum(2) > 0).sum(1)
    pairs = size * (size - 1)
    inside = np.square(shown.sum(1)).sum(1) - np.square(shown).sum((1, 2))
    some = pairs > 0
    return float(1 - (inside[some] / pairs[some]).mean()) if some.any() else 0.0


def reliability(scores: Floats, hits: NDArray[np.bool_], *, bins: int = 10) -> list[tuple[float, float, int]]:
    """Mean score, share of hits and number of pairs in bins of equal size by score."""
    order = np.argsort(scores, kind="stable")
    parts = np.array_split(order, min(bins, max(len(order), 1)))
    return [(float(scores[part].mean()), float(hits[part].mean()), len(part)) for part in parts if len(part)]
