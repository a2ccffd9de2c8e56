"""From logits to probabilities: P(item is among the user's next ten), by bucket of K (Platt 1999).

Letters: E events, N items, B buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models import popularity
from models.replay import Replay

_SAMPLE = 300
_LEAST_EVENTS = 30
_LEAST_SCALE = 0.05
_NEWTON_STEPS = 30


def calibrate(replay: Replay, *, seed: int) -> Tensor:
    """Scale and offset [B, 2], scale positive; buckets with few events use all events."""
    bucket = popularity.bucket_of(replay.num_events)
    generator = torch.Generator().manual_seed(seed)
    everything = _fit(replay, torch.randperm(len(bucket), generator=generator)[:_SAMPLE])
    rows = []
    for number in range(popularity.NUM_BUCKETS):
        events = (bucket == number).nonzero()[:, 0]
        events = events[torch.randperm(len(events), generator=generator)[:_SAMPLE]]
        rows.append(_fit(replay, events) if len(events) >= _LEAST_EVENTS else everything)
    return torch.stack(rows)


def _fit(replay: Replay, events: Tensor) -> Tensor:
    """Logistic regression of "in the query" on the logit: [2], by Newton's method in float64."""
    logits, query = replay.start[events], replay.query[events]
    wanted = torch.zeros(len(events), logits.shape[1] + 1)
    wanted.scatter_(1, torch.where(query >= 0, query, logits.shape[1]), 1.0)
    possible = logits > -torch.inf
    x = torch.stack([logits[possible].double(), torch.ones(int(possible.sum()), dtype=torch.float64)], 1)
    y = wanted[:, :-1][possible].double()
    # A mild prior around scale 1 keeps separable data finite.
    prior, strength = torch.tensor([1.0, -5.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    found = prior.clone()
    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(x @ found)
        gradient = x.T @ (p - y) + strength @ (found - prior)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + strength
        found = found - torch.linalg.solve(hessian, gradient)
    return torch.stack([found[0].clamp(min=_LEAST_SCALE), found[1]]).float()
