"""The k best of every row, exactly, equal scores ordered by column."""

from __future__ import annotations

import torch
from torch import Tensor

_SIGN = 0x7FFFFFFF
_FOLD = 4  # scores in one stretch
_SHORT = 10  # rows of fewer than so many times k scores are not folded; measured


def highest(scores: Tensor, k: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """The k highest scores of every row [U, k] and their columns, of equal ones any; best first, if `ordered`.

    Long rows are folded: the k highest scores lie in the k stretches whose maxima are highest, and these maxima are
    found in the same way.
    """
    num = scores.shape[1]
    if num < _SHORT * k:
        values, columns = scores.topk(k, dim=1, sorted=ordered)
        return values, columns
    stride = num // _FOLD
    maxima = scores[:, : _FOLD * stride].view(-1, _FOLD, stride).amax(1)
    stretches = highest(maxima, k, ordered=False)[1]
    steps = torch.arange(0, _FOLD * stride, stride, device=scores.device)
    candidates = (stretches[:, None] + steps[:, None]).flatten(1)
    if _FOLD * stride < num:
        rest = torch.arange(_FOLD * stride, num, device=scores.device)
        candidates = torch.cat([candidates, rest.expand(len(scores), -1)], 1)
    values, place = scores.gather(1, candidates).topk(k, dim=1, sorted=ordered)
    return values, candidates.gather(1, place)


def best_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns [U, k] and scores [U, k] (float32), best first, equal ones by column; -1 and -inf where there is none."""
    kept = min(k, scores.shape[1])
    values, columns = highest(scores, kept)
    again = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)).any(1)
    if bool(again.any()):
        values[again], columns[again] = _by_column(values[again], columns[again])
    # which of the scores that equal the last one kept are there is chance
    last = values[:, -1:]
    at_least = torch.ge(scores, last, out=torch.empty_like(scores)).sum(1)  # as floats: faster
    tied = (at_least > kept) & (last[:, 0] > -torch.inf)
    if bool(tied.any()):
        values[tied], columns[tied] = _with_ties(scores[tied], kept)
    columns = torch.where(values > -torch.inf, columns, -1)
    short = k - kept
    columns = torch.nn.functional.pad(columns, (0, short), value=-1)
    return columns, torch.nn.functional.pad(values, (0, short), value=-torch.inf)


def _by_column(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Order by score descending, then column ascending."""
    by_column = columns.argsort(dim=1)
    values, columns = values.gather(1, by_column), columns.gather(1, by_column)
    by_value = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, by_value), columns.gather(1, by_value)


def _with_ties(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by one int64 key per score, whose order is (score descending, column ascending): slower, exact."""
    num = scores.shape[1]
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = (bits ^ ((bits >> 31) & _SIGN)).long()
    keys = (ordered << 32) | torch.arange(num - 1, -1, -1, device=scores.device)
    columns = num - 1 - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
    return scores.gather(1, columns), columns
