"""Position popularity: what users take as their K-th item, in decayed counts per bucket of K.

Pure functions. The counts belong to a partition; when they take effect is the caller's business.
Letters: B buckets of K, N catalogue items, n events.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUCKET_STARTS = (1, 3, 6, 11, 21, 51, 101)
NUM_BUCKETS = len(BUCKET_STARTS) + 1
# Offsets of a partition between two moments at which counts take effect. Soon is better: where few events come a day,
# popularity moves with the season. Pairs wait longer (`pair_counts.PAIR_EPOCH`).
POPULARITY_EPOCH = 128
_STARTS = torch.tensor(BUCKET_STARTS)

# Mixture behind one row of priors: its own and the next bucket in equal parts, and all buckets against thin counts.
_SHARE_NEAR = 0.85
_FLOOR = 0.17  # probability mass spread evenly, so that an item without counts keeps a finite logarithm


def bucket_of(num_events: Tensor) -> Tensor:
    """Bucket 0..B-1 of K = number of earlier positives, any shape of int64."""
    return torch.bucketize(num_events, _STARTS.to(num_events.device), right=True)


def advance(counts: Tensor, buckets: Tensor, items: Tensor, *, half_life: float) -> Tensor:
    """Counts [B, N] after the n events (buckets [n], items [n], oldest first), each decaying all cells by one step.

    Advancing by two halves equals advancing at once up to float32 rounding. An item of -1 only decays.
    """
    num = len(items)
    age = torch.arange(num - 1, -1, -1, dtype=torch.float64, device=counts.device)
    gain = torch.where(items >= 0, torch.pow(0.5, age / half_life), torch.zeros_like(age))
    cell = buckets * counts.shape[1] + items.clamp(min=0)
    # float64, so that the order of the additions cannot show in the float32 result
    remaining: float = 0.5 ** (num / half_life)
    total = counts.double().flatten() * remaining
    return total.index_add(0, cell, gain).view_as(counts).to(counts.dtype)


def priors(counts: Tensor) -> Tensor:
    """Log popularity by bucket, z-scored over the catalogue: [B, N] from counts [B, N]; zeros without counts."""
    own = counts / counts.sum(1, keepdim=True).clamp(min=1e-9)
    following = torch.cat([own[1:], own[-1:]])
    total = counts.sum(0)
    overall = total / total.sum().clamp(min=1e-9)
    share = _SHARE_NEAR * 0.5 * (own + following) + (1 - _SHARE_NEAR) * overall
    logs = torch.log(share + _FLOOR / counts.shape[1])
    centred = logs - logs.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
