"""The k best of every row, exactly, equal scores ordered by column.

On a CPU the sorting is numpy's, which is vectorised where torch's is not: a third of the time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SIGN = 0x7FFFFFFF
_LOW = 0xFFFFFFFF
_FOLD = 4  # scores in one stretch
_SHORT = 10  # rows of fewer than so many times k scores are not folded; measured


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of every row [U, k] and their columns, in any order; of equal ones any.

    Long rows are folded: the k highest scores lie in the k stretches whose maxima are highest, and these maxima are
    found in the same way.
    """
    found, candidates = _candidates(scores, k)
    place = _chosen(found, k)
    return found.gather(1, place), place if candidates is None else candidates.gather(1, place)


def best_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns [U, k] and scores [U, k] (float32), best first, equal ones by column; -1 and -inf where there is none."""
    kept = min(k, scores.shape[1])
    everything = torch.arange(scores.shape[1], device=scores.device)
    found, candidates = _candidates(scores, kept)
    columns = _best(found, everything if candidates is None else candidates, kept)
    values = scores.gather(1, columns)
    # which of the scores that equal the last one kept are among the candidates is chance
    last = values[:, -1:]
    at_least = torch.ge(scores, last, out=torch.empty_like(scores)).sum(1)  # as floats: faster
    tied = (at_least > kept) & (last[:, 0] > -torch.inf)
    if bool(tied.any()):
        columns[tied] = _best(scores[tied], everything, kept)
    columns = torch.where(values > -torch.inf, columns, -1)
    short = k - kept
    columns = torch.nn.functional.pad(columns, (0, short), value=-1)
    return columns, torch.nn.functional.pad(values, (0, short), value=-torch.inf)


def _candidates(scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """Scores [U, X] among which the k highest are, and their columns [U, X]; all of a short row, without columns."""
    num = scores.shape[1]
    if num < _SHORT * k:
        return scores, None
    stride = num // _FOLD
    maxima = scores[:, : _FOLD * stride].view(-1, _FOLD, stride).amax(1)
    stretches = highest(maxima, k)[1]
    steps = torch.arange(0, _FOLD * stride, stride, device=scores.device)
    columns = (stretches[:, None] + steps[:, None]).flatten(1)
    if _FOLD * stride < num:
        rest = torch.arange(_FOLD * stride, num, device=scores.device)
        columns = torch.cat([columns, rest.expand(len(scores), -1)], 1)
    return scores.gather(1, columns), columns


def _chosen(scores: Tensor, k: int) -> Tensor:
    """Columns [U, k] of the k highest scores of every row [U, X], ascending; of equal ones any."""
    if scores.device.type != "cpu":
        return scores.topk(k, dim=1, sorted=False).indices
    rows = scores.numpy()
    taken = rows >= np.sort(rows, axis=1)[:, -k, None]  # a mask is read faster than an order is found
    odd = np.flatnonzero(taken.sum(1) != k)  # several equal the last one
    if len(odd):
        taken[odd] = False
        taken[odd[:, None], np.argsort(-rows[odd], axis=1, kind="stable")[:, :k]] = True
    places = np.flatnonzero(taken).reshape(-1, k)
    places -= np.arange(len(rows))[:, None] * rows.shape[1]
    return torch.from_numpy(places)


def _best(scores: Tensor, columns: Tensor, k: int) -> Tensor:
    """Columns [U, k] of the k best scores [U, X], which stand in columns ([U, X] or [X]); best first, then in order."""
    # one whole number per score, whose order is (score descending, column ascending)
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = ((bits >> 31) & _SIGN).bitwise_xor_(bits)
    keys = (ordered.long() << 32).bitwise_or_(_LOW - columns)
    if keys.device.type != "cpu":
        best = keys.topk(k, dim=1).values
    else:
        keys.numpy().sort(axis=1)
        best = keys[:, -k:].flip(1)
    return _LOW - (best & _LOW)
