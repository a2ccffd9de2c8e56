"""A softmax over sampled candidates in place of the whole catalogue, corrected for how they were drawn.

With a chance c_i for item i to be among the candidates, `sum over candidates of exp(s_i) / c_i` estimates the sum over
the catalogue (Horvitz and Thompson 1952), so `s_i - log c_i` takes the place of s_i. The item that came is always among
them, with chance 1. Letters: U users, C candidates, N catalogue items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_POWER = 0.75
_GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly, in any number


class Sampling(NamedTuple):
    """From how many items on candidates are drawn, and how many."""

    from_items: int
    num: int


class Candidates(NamedTuple):
    """Columns [C] (or [U, C], each user's own), ascending, and minus the log of their chance; -inf for padding."""

    columns: Tensor
    correction: Tensor


def draw(weights: Tensor, num: int, *, turn: int) -> Candidates:
    """Draw at most `num` columns by weights [N] ** 0.75 > 0, each once.

    Systematic sampling: a comb whose offset depends on the turn alone, so everybody draws the same, and over the turns
    every item has its chance.
    """
    share = weights.double() ** _POWER
    # one tooth is left free: the comb may catch one more or one less
    chance = ((num - 1) * share / share.sum()).clamp(max=1.0)
    passed = torch.floor(torch.cumsum(chance, 0) + (0.5 + turn * _GOLDEN) % 1.0)
    caught = (torch.diff(passed, prepend=passed.new_zeros(1)) > 0).nonzero()[:, 0]
    columns, correction = caught.new_full((num,), len(weights) - 1), torch.full((num,), -torch.inf).to(weights.device)
    columns[: len(caught)] = caught
    correction[: len(caught)] = -torch.log(chance[caught]).float()
    return Candidates(columns, correction)


def predict(scores: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    """Prediction [U, C + 1] in place of scores: corrected logits of columns [C] or [U, C], the target's own last."""
    num = columns.shape[-1]
    place = torch.searchsorted(columns, targets[:, None] if columns.ndim > 1 else targets)
    place = place.view(-1, 1).clamp(max=num - 1)
    found = columns.expand(len(targets), num).gather(1, place) == targets[:, None]
    # a target that was drawn counts once
    scores.scatter_(1, torch.where(found, place, num), torch.where(found, -torch.inf, scores[:, num:]))
    return torch.softmax(scores, 1, out=scores)
