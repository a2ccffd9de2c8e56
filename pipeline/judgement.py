"""Judging versions by their prequential losses: a pure function of arrays, thresholds and a seed.

A challenger is paired with the live version, event by event, on later events than it learnt from; a canary and a new
live version are compared with what the events before and the other partitions let expect.  Losses are -log softmax,
clipped at 20: lower is better, a gain is positive.  Letters: E events, U users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.figures import Interval, interval, user_means
from models.popularity import BUCKET_STARTS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_NOTHING = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Rules:
    """When a version may go on; shares are of the other's loss."""

    least_events: int = 2000
    least_users: int = 100
    slice_events: int = 200
    slice_worse: float = 0.01
    canary_events: int = 1000
    canary_hours: float = 24.0
    worse: float = 0.02


@dataclass(frozen=True)
class Losses:
    """Losses [E] of some events, whose they are (numbers [E]), and the slices they fall into (masks [E]) by name."""

    loss: Floats
    users: Ints
    slices: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """None: too early to say. Otherwise whether the version is good enough, why, and the figures."""

    good: bool | None
    reason: str
    figures: dict[str, Any]


def slices_of(
    num_events: Ints, new_items: NDArray[np.bool_], types: Ints, scenes: Sequence[str | None], names: Mapping[int, str]
) -> dict[str, NDArray[np.bool_]]:
    """Masks [E] by name: the bucket of K, items that the live version never saw, each event type and each scene."""
    edges = [0, *BUCKET_STARTS, np.iinfo(np.int64).max]
    masks = {
        f"K {low}" + ("" if high == low + 1 else "+" if high == edges[-1] else f"-{high - 1}"): (num_events >= low)
        & (num_events < high)
        for low, high in pairwise(edges)
    }
    masks |= {"new items": new_items, "known items": ~new_items}
    masks |= {f"type {name}": types == code for code, name in names.items() if (types == code).any()}
    where = np.array([scene or "" for scene in scenes], np.str_)
    return masks | {f"scene {scene}": where == scene for scene in np.unique(where).tolist() if scene}


def paired(live: Losses, challenger: Floats, rules: Rules, *, seed: int = 0) -> Verdict:
    """Judge a challenger's losses [E] of the very events of the live version's.

    It is good if the lower 95 % bound of its gain is above zero, users bootstrapped, and no slice of some size is
    worse by more than `slice_worse`.
    """
    num_users = len(np.unique(live.users))
    counts = {"events": len(live.loss), "users": num_users}
    if len(live.loss) < rules.least_events or num_users < rules.least_users:
        wanted = f"{rules.least_events:,} events of {rules.least_users:,} users"
        return Verdict(
            None, f"{len(live.loss):,} later events of {num_users:,} users are too few, {wanted} it takes", counts
        )
    gain = _interval(live.loss - challenger, live.users, seed)
    slices = {
        name: _slice(live.loss[mask], challenger[mask])
        for name, mask in live.slices.items()
        if int(mask.sum()) >= rules.slice_events
    }
    figures = counts | {
        "loss_live": _rounded(live.loss.mean()), "loss_challenger": _rounded(challenger.mean()),
        "gain": gain.as_list(), "slices": slices, "rules": asdict(rules),
    }  # fmt: skip
    worst = min(slices, key=lambda name: slices[name]["gain_share"], default=None)
    said = f"gain {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] per event over {counts['events']:,} later events"
    if gain.low <= 0:
        return Verdict(False, f"not shown to be better: {said}", figures)
    if worst is not None and slices[worst]["gain_share"] < -rules.slice_worse:
        share = -slices[worst]["gain_share"]
        return Verdict(False, f"better on the whole, but worse by {share:.1%} for {worst}: {said}", figures)
    return Verdict(True, f"better: {said}, no slice worse by more than {rules.slice_worse:.0%}", figures)


def canary(mine: tuple[Losses, Losses], others: tuple[Losses, Losses], rules: Rules, *, seed: int = 0) -> Verdict:
    """Judge a canary by its partitions' (before, since) against the same of the others'.

    What changed for everybody is no fault of the canary's. It is bad when it is worse by more than `worse` of the loss
    before and by three standard errors (it is looked at many times); good after `canary_events` when it is not.
    Where there are no others, or they have been silent, it is compared with what was before alone.
    """
    (before, since), (others_before, others_since) = mine, others
    change, at_large = _difference(before, since, seed), _NOTHING
    if min(len(others_before.loss), len(others_since.loss)) >= _least(rules):
        at_large = _difference(others_before, others_since, seed + 1)
    usual = float(before.loss.mean()) if len(before.loss) else 0.0
    error = float(np.hypot(_error(change), _error(at_large)))
    return _watched(change.mean - at_large.mean, error, usual, since, rules)


def successor(before: Losses, since: Losses, rules: Rules, *, seed: int = 0) -> Verdict:
    """Judge a version that went live by its losses since, against those of what it replaced on the events before."""
    change = _difference(before, since, seed)
    usual = float(before.loss.mean()) if len(before.loss) else 0.0
    return _watched(change.mean, _error(change), usual, since, rules)


def steadied(losses: Floats, popular_ranks: Ints, like: tuple[Floats, Ints]) -> Floats:
    """Losses [E] less what the item's popularity lets expect, which no version changes; `like`: both before.

    The difference of two means of these is that of the losses, with less noise from which items came.
    """
    if len(like[0]) == 0:
        return losses
    known = np.log(like[1])
    spread = known.var()
    slope = ((like[0] - like[0].mean()) * (known - known.mean())).mean() / spread if spread > 0 else 0.0
    steady: Floats = losses - slope * (np.log(popular_ranks) - known.mean())
    return steady


def _watched(excess: float, error: float, usual: float, since: Losses, rules: Rules) -> Verdict:
    num, half = len(since.loss), 1.96 * error
    figures = {"events": num, "excess": [_rounded(v) for v in (excess, excess - half, excess + half)]}
    figures |= {"usual_loss": _rounded(usual), "rules": asdict(rules)}
    said = f"excess loss {excess:+.4f} [{excess - half:+.4f}, {excess + half:+.4f}] over {num:,} events"
    if num < _least(rules) or usual == 0.0:
        return Verdict(None, f"too early: {said}", figures)
    if excess > max(rules.worse * usual, 3 * error):
        return Verdict(False, f"worse than expected: {said}, more than {rules.worse:.0%} of {usual:.3f}", figures)
    if num < rules.canary_events:
        return Verdict(None, f"not worse so far: {said}", figures)
    return Verdict(True, f"as good as expected: {said}", figures)


def _least(rules: Rules) -> int:
    """Events that must have come before anything is said of them: an interval of a handful of users is none."""
    return min(rules.canary_events, max(50, rules.canary_events // 5))


def _difference(before: Losses, since: Losses, seed: int) -> Interval:
    """How much the losses rose; both samples' users are bootstrapped, each by its own mean."""
    first, second = (_interval(one.loss, one.users, seed) for one in (before, since))
    half = 1.96 * float(np.hypot(_error(first), _error(second)))
    mean = second.mean - first.mean
    return Interval(mean, mean - half, mean + half)


def _error(value: Interval) -> float:
    return (value.high - value.low) / 2 / 1.96


def _interval(values: Floats, users: Ints, seed: int) -> Interval:
    means = user_means(torch.from_numpy(values).float(), torch.from_numpy(users))
    return interval(means, seed=seed, draws=min(1000, max(100, 10_000_000 // max(1, len(means)))))


def _slice(live: Floats, challenger: Floats) -> dict[str, Any]:
    gain = float(live.mean() - challenger.mean())
    share = gain / max(float(live.mean()), 1e-9)
    return {"events": len(live), "gain": _rounded(gain), "gain_share": _rounded(share)}


def _rounded(value: float) -> float:
    return round(float(value), 5)
