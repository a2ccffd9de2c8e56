"""Carrying users' inner states from one version's factors into another's, without replaying an event.

A state is a discounted sum of honest residuals, which are differences of item factors. So the linear map that takes
one version's item factors, less their mean, closest to the other's takes its states along:
`min_M sum_i w_i |(a_i - mean a) M - (b_i - mean b)|^2 + ridge |M|^2` over the items that both know, w_i the item's
share of the events.  What the map cannot express is lost, and the count of residuals stays: the state is as old as it
was.  Letters: n shared items, F source's factors, G target's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.meta_parameters import MetaParameters

RIDGE = 1e-3  # of the mean squared length of the source's factors
LEAST_ITEMS = 2  # shared items per factor, below which states begin anew


class StateMap(NamedTuple):
    """A matrix [F, G] (float64), and the share of the target's variance over shared items that it reaches."""

    matrix: Tensor
    explained: float


def state_map(source: MetaParameters, target: MetaParameters) -> StateMap | None:
    """Fit the map of states from `source` [F] to `target` [G]; None when too few items are shared."""
    row_of = {item_id: row for row, item_id in enumerate(target.item_ids)}
    shared = [(row, row_of[item_id]) for row, item_id in enumerate(source.item_ids) if item_id in row_of]
    size = source.item_factors.shape[1]
    if len(shared) < LEAST_ITEMS * size:
        return None
    rows = torch.tensor(shared)
    weight = target.item_events[rows[:, 1]].double() + 1.0
    weight = (weight / weight.sum())[:, None]
    ours, theirs = source.item_factors[rows[:, 0]].double(), target.item_factors[rows[:, 1]].double()
    ours, theirs = ours - (weight * ours).sum(0), theirs - (weight * theirs).sum(0)
    moments = ours.T @ (weight * ours)
    ridge = RIDGE * moments.diagonal().mean().clamp(min=1e-12)
    matrix = torch.linalg.solve(moments + ridge * torch.eye(size, dtype=torch.float64), ours.T @ (weight * theirs))
    left, whole = ((weight * values.square()).sum() for values in (theirs - ours @ matrix, theirs))
    return StateMap(matrix, float(1.0 - left / whole.clamp(min=1e-12)))
