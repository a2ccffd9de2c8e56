"""What a prediction may know of a user: the support set and the items seen before the event.

Letters: E events, U users, S support slots, X marks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.support import Ints, UserTable, tail_length


@dataclass(slots=True)
class Known:
    """What predictions for U users may know: support sets [U, S] and seen or dismissed items [U, X], 0 where none."""

    support_items: NDArray[np.int32]
    support_types: NDArray[np.int8]
    marks: NDArray[np.int32]

    @classmethod
    def of(cls, table: UserTable, slots: Ints) -> Known:
        """As the users' memory is now."""
        return cls(table.support_items[slots], table.support_types[slots], _marks(table, slots))


class Before:
    """What was known before each of E events, noted round by round."""

    def __init__(self, num_events: int) -> None:
        self._place = np.zeros((num_events, 2), np.int64)  # round noted in, row in that round
        self._rounds: list[Known] = []

    def note(self, events: Ints, table: UserTable, slots: Ints) -> None:
        """Note the present memory of these events' users."""
        self._place[events] = np.stack([np.full(len(events), len(self._rounds)), np.arange(len(events))], 1)
        self._rounds.append(Known.of(table, slots))

    def of(self, events: Ints) -> Known:
        """What was known before these events, in their order."""
        parts = [(self._rounds[number], row) for number, row in self._place[events].tolist()]
        width = max(known.marks.shape[1] for known, _ in parts)
        marks = np.zeros((len(parts), width), np.int32)
        for target, (known, row) in zip(marks, parts, strict=True):
            target[: known.marks.shape[1]] = known.marks[row]
        used = int(np.flatnonzero(marks.any(0)).max(initial=-1)) + 1
        items, types = (
            np.stack([getattr(known, name)[row] for known, row in parts]) for name in ("support_items", "support_types")
        )
        return Known(items, types, marks[:, :used])


def _marks(table: UserTable, slots: Ints) -> NDArray[np.int32]:
    """Seen (+item_no) and dismissed (-item_no) items [U, X], 0 where none."""
    inside = np.arange(table.recent_seen.shape[1]) < tail_length(table.num_seen[slots])[:, None]
    marks: NDArray[np.int32] = np.where(inside, table.recent_seen[slots], 0)
    long = {place: table.seen(slot) for place, slot in enumerate(slots.tolist()) if slot in table.older_seen}
    missing = max(map(len, long.values()), default=0) - marks.shape[1]
    if missing > 0:
        marks = np.pad(marks, ((0, 0), (0, missing)))
    for place, row in long.items():
        marks[place, : len(row)] = row
    return marks
