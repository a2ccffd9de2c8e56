"""Several events of a user in one call: what was kept of the user before each, as if they had come one by one.

What is kept is a discounted sum, `after = discount * before + gain` where the event teaches anything, else the same.
Everything here is elementwise over rows, so that cutting a log into other calls changes no bit.
Letters: U events, V entries kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Chains:
    """The order of a call's events.

    Args:
        previous: [U] row of the same user's event before, -1 = none in this call. Raises ValueError where that row
            does not come earlier.
        known: [U] bool, whether the event teaches anything.

    """

    def __init__(self, previous: Tensor | None, known: Tensor) -> None:
        """Find the turns."""
        self._known = known
        self._turns: list[list[int]] = []
        if previous is None or not bool((previous >= 0).any()):
            return
        self._turns, root, taught = _turns(previous.tolist(), known.tolist())
        self._root, self._taught = (torch.tensor(rows, device=known.device) for rows in (root, taught))
        self._order = torch.tensor([row for turn in self._turns for row in turn], device=known.device)
        self._place = torch.empty_like(self._order)
        self._place[self._order] = torch.arange(len(self._order), device=known.device)
        self._earlier = self._place[previous[self._order]]

    def counts(self, counts: Tensor) -> Tensor:
        """Events that have taught [U] before each, from `counts` [U] before the user's first in this call."""
        return counts[self._root] + self._taught if self._turns else counts

    def counts_after(self, before: Tensor) -> Tensor:
        """The same after each [U]."""
        return before + self._known

    def carry(self, discount: float, state: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Before and after every event [U, V]; `state` [U, V] is that before the user's first in this call."""
        if not self._turns:
            return state, torch.where(self._known[:, None], discount * state + gain, state)
        kept, gain = torch.where(self._known, discount, 1.0), torch.where(self._known[:, None], gain, 0.0)
        before, after = state.index_select(0, self._order), torch.empty_like(state)
        columns = before, after, kept[self._order, None], gain.index_select(0, self._order), self._earlier
        sizes = [len(turn) for turn in self._turns]
        for turn, (had, gets, share, learnt, earlier) in enumerate(
            zip(*(torch.split(column, sizes) for column in columns), strict=True)
        ):
            if turn:
                torch.index_select(after, 0, earlier, out=had)
            torch.mul(had, share, out=gets).add_(learnt)
        return before.index_select(0, self._place), after.index_select(0, self._place)


def _turns(previous: list[int], known: list[bool]) -> tuple[list[list[int]], list[int], list[int]]:
    """Rows in turns, each of which needs turns before it only; of every row, the user's first, and how many taught."""
    turns, turn_of = list[list[int]](), list[int]()
    root, taught = list(range(len(previous))), [0] * len(previous)
    for row, earlier in enumerate(previous):
        if earlier >= row:
            raise ValueError(f"row {row} follows row {earlier}: a user's events must be oldest first")
        turn = 0
        if earlier >= 0:
            turn, root[row], taught[row] = turn_of[earlier] + 1, root[earlier], taught[earlier] + known[earlier]
        turn_of.append(turn)
        if turn == len(turns):
            turns.append([])
        turns[turn].append(row)
    return turns, root, taught
