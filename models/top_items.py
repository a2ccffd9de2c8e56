"""The k best of every row, exactly, equal scores ordered by column."""

from __future__ import annotations

import torch
from torch import Tensor

_SIGN = 0x7FFFFFFF


def best_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns [U, k] and scores [U, k] (float32), best first; -1 and -inf past the last finite score."""
    num = scores.shape[1]
    kept = min(k, num)
    values, columns = scores.topk(kept, dim=1)
    values, columns = _by_column(values, columns)
    # topk chooses freely among scores that equal the last one kept
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
