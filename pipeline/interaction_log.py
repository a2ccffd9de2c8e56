"""Any file of interactions as columns in stream order, in bounded memory: every line by the worker's own decoder.

Letters: E events, U users, N items.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipeline.support import Ints
from schemas.event_types import CODES, NAMES
from schemas.events import Interaction, Rejected

TIE_SEED = 12_345
TELL_EVERY = 5000
_ALL = 2**32


@dataclass(frozen=True)
class InteractionLog:
    """E events in stream order.

    Attributes:
        user_ids: [U], numbers ascending by id (as numbers where all ids are).
        item_ids: [N] in the bytes order of the ids: every item of the catalogue or of an event.
        texts: [N] None where no catalogue names the item.
        users, items, times, types: [E] numbers, rows, epoch ms, codes of the event types.
        positive: [E] whether the event says "wanted".
        weights: [E] how strongly.
        share_of_users: which part of the file's users was kept; 1.0 for all.
        rejected: lines that no worker would apply, by reason.

    """

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    texts: tuple[str | None, ...]
    users: Ints
    items: Ints
    times: Ints
    types: Ints
    positive: NDArray[np.bool_]
    weights: NDArray[np.float32]
    share_of_users: float
    rejected: Counter[str]

    def __len__(self) -> int:
        return len(self.users)

    def events(self, numbers: Ints) -> Iterable[Interaction]:
        """The events of these numbers as the decoder gave them; the number stands in for event id and hashes."""
        columns = (self.users, self.items, self.times, self.types)
        for number, user, item, time, code in zip(
            numbers.tolist(), *(column[numbers].tolist() for column in columns), strict=True
        ):
            user_id, item_id = self.user_ids[user], self.item_ids[item]
            yield Interaction(str(number), user_id, item_id, NAMES[code], time, None, 0, number, 0)


@dataclass
class Collector:
    """Takes decoded events; beyond `most_users` it keeps the users whose hash is lowest, whole histories of them."""

    most_users: int
    rejected: Counter[str] = field(default_factory=Counter)
    _limit: int = _ALL
    _user_of: dict[str, int] = field(default_factory=dict)
    _item_of: dict[str, int] = field(default_factory=dict)
    _columns: tuple[array[int], ...] = field(default_factory=lambda: tuple(array("q") for _ in range(5)))

    def add(self, event: Interaction | Rejected) -> None:
        """Keep an event, or count why it cannot be."""
        if isinstance(event, Rejected):
            self.rejected[event.reason] += 1
            return
        if event.user_id not in self._user_of:
            if self._limit < _ALL and crc32(event.user_id.encode()) >= self._limit:
                return
            self._user_of[event.user_id] = len(self._user_of)
        item = self._item_of.setdefault(event.item_id, len(self._item_of))
        row = (self._user_of[event.user_id], item, event.ts_ms, CODES[event.type], event.id_hash)
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        if len(self._user_of) > self.most_users:
            self._halve()

    def _halve(self) -> None:
        """Keep half of the users, and their events."""
        self._limit //= 2
        kept = [user for user in self._user_of if crc32(user.encode()) < self._limit]
        number = np.full(len(self._user_of), -1)
        number[[self._user_of[user] for user in kept]] = np.arange(len(kept))
        users, *others = (np.frombuffer(column, np.int64) for column in self._columns)
        mask = number[users] >= 0
        self._columns = tuple(array("q", column[mask].tobytes()) for column in (number[users], *others))
        self._user_of = dict(zip(kept, range(len(kept)), strict=True))

    def log(
        self, texts: Mapping[str, str], label_and_weight: tuple[NDArray[np.bool_], NDArray[np.float32]]
    ) -> InteractionLog:
        """Order and number everything.

        Events are ordered by time. A file that is in time order keeps its order; otherwise ties are broken by a seeded
        draw, never by id (ids leak what was taken together). A repeated event id of a user counts once.
        """
        users, items, times, types, ids = (np.frombuffer(column, np.int64) for column in self._columns)
        order = _order(times)
        order = order[_first_of_each(users[order], ids[order])]
        user_number, user_ids = _numbered(list(self._user_of), _by_id(self._user_of))
        names = sorted({*self._item_of, *texts}, key=str.encode)
        row_of = {item_id: row for row, item_id in enumerate(names)}
        rows = np.array([row_of[item_id] for item_id in self._item_of], np.int64)
        positive, weight = label_and_weight
        return InteractionLog(
            user_ids=user_ids,
            item_ids=tuple(names),
            texts=tuple(texts.get(item_id) for item_id in names),
            users=user_number[users[order]],
            items=rows[items[order]],
            times=times[order],
            types=types[order],
            positive=positive[types[order]],
            weights=weight[types[order]],
            share_of_users=self._limit / _ALL,
            rejected=self.rejected,
        )


def collect(events: Iterable[Interaction | Rejected], *, most_users: int, progress: Callable[[int], None]) -> Collector:
    """Take all events in, telling how many every few thousand."""
    collector = Collector(most_users)
    for number, event in enumerate(events, 1):
        collector.add(event)
        if number % TELL_EVERY == 0:
            progress(number)
    return collector


def ordered_by_id(ids: Iterable[str]) -> list[str]:
    """Ids ascending: as numbers where all are, else by their bytes."""
    return sorted(ids, key=_by_id(ids))


def _by_id(ids: Iterable[str]) -> Callable[[str], tuple[int, bytes]]:
    numeric = all(one.isascii() and one.isdigit() for one in ids)
    return lambda one: (int(one) if numeric else 0, one.encode())


def _numbered(ids: list[str], key: Callable[[str], tuple[int, bytes]]) -> tuple[Ints, tuple[str, ...]]:
    """New number of each id [U], and the ids in that order."""
    order = sorted(range(len(ids)), key=lambda at: key(ids[at]))
    number = np.empty(len(ids), np.int64)
    number[order] = np.arange(len(ids))
    return number, tuple(ids[at] for at in order)


def _order(times: Ints) -> Ints:
    if (times[1:] >= times[:-1]).all():
        return np.arange(len(times))
    return np.lexsort((np.random.default_rng(TIE_SEED).random(len(times)), times))


def _first_of_each(users: Ints, ids: Ints) -> NDArray[np.bool_]:
    """Mask of the events whose (user, event id) did not come before."""
    order = np.lexsort((np.arange(len(users)), ids, users))
    again = (users[order][1:] == users[order][:-1]) & (ids[order][1:] == ids[order][:-1])
    first = np.ones(len(users), bool)
    first[order[1:][again]] = False
    return first
