"""The two protocols of judging: the stream (rank, then learn, event by event) and static episodes (after K events).

Both order users by their first event and fit on nothing that comes after the first event of the users to be judged.
Letters: E events of a log, S events of the stream, C cases, Q query slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.interaction_log import InteractionLog
from pipeline.support import Ints
from schemas.errors import ConfigurationError

Phase = Literal["tune", "test"]
Query = Literal["gap", "adjacent"]

TUNE_SHARE, TEST_SHARE = 0.5, 0.8
NEXT = 10
SHOTS = (1, 3, 5, 10, 20)
NUM_HEAD, NUM_QUERY, MIN_QUERY = 20, 20, 5


class TooLittleData(ConfigurationError):
    """The protocol needs more users or longer histories than the data has: the message says which and what to do."""


@dataclass(frozen=True)
class StreamCut:
    """What to fit, what to stream, and what is looked for.

    Attributes:
        fit: numbers of the events before the cut.
        stream: numbers of the events from the cut on, positive or not.
        judged: [S] numbers of the positives of the stream.
        num_events: [S] K before each of them.
        next_items: [S, 10] rows of this and the user's next nine positives inside the phase, -1 where there are fewer.
        unseen: [S] whether the user has no positive before the cut.

    """

    fit: Ints
    stream: Ints
    judged: Ints
    num_events: Ints
    next_items: Ints
    unseen: NDArray[np.bool_]


@dataclass(frozen=True)
class StaticCut:
    """What to fit, and the users to be judged after their first K positives.

    Attributes:
        fit: numbers of the training users' events before the first event of the users to be judged.
        users: [C] user numbers.
        histories: per case, numbers of the user's positives, oldest first.

    """

    fit: Ints
    users: Ints
    histories: tuple[Ints, ...]

    def queries(self, log: InteractionLog, shots: int, query: Query) -> Iterator[tuple[Ints, Ints]]:
        """Rows not to be ranked, and rows to be found, after `shots` events."""
        for history in self.histories:
            items = log.items[history]
            start = shots if query == "adjacent" else NUM_HEAD
            yield items[: shots if query == "adjacent" else NUM_HEAD], items[start : start + NUM_QUERY]


def cut_stream(log: InteractionLog, phase: Phase = "test") -> StreamCut:
    """Cut at the first event of the user who stands at 80 % (phase tune: at 50 %, ending where test begins)."""
    first = _first_times(log)
    ordered = np.sort(first, kind="stable")
    if len(ordered) < 2:
        raise TooLittleData("a stream needs at least two users: give a larger file")
    tune, test = (int(ordered[int(share * len(ordered))]) for share in (TUNE_SHARE, TEST_SHARE))
    cut, end = (test, np.iinfo(np.int64).max) if phase == "test" else (tune, test)
    fit, stream = np.flatnonzero(log.times < cut), np.flatnonzero((log.times >= cut) & (log.times < end))
    judged = stream[log.positive[stream]]
    if not log.positive[fit].any() or not len(judged):
        raise TooLittleData("every event has the same time: --mapping says where the time of an event is found")
    everything = np.concatenate([fit[log.positive[fit]], judged])
    position, following = _positions(log, everything)
    place = np.arange(len(everything) - len(judged), len(everything))
    unseen = ~np.isin(log.users[judged], log.users[fit[log.positive[fit]]])
    return StreamCut(fit, stream, judged, position[place], following[place], unseen)


def cut_static(log: InteractionLog) -> StaticCut:
    """70 % of the users train, 10 % validate, 20 % are judged; those with at least 25 positives are cases."""
    first = _first_times(log)
    numbers = np.unique(log.users[log.positive])
    ordered = numbers[np.lexsort((numbers, first))]
    a, b = int(0.7 * len(ordered)), int(0.8 * len(ordered))
    positives = np.flatnonzero(log.positive)
    if not 0 < a <= b < len(ordered):
        raise TooLittleData("static episodes need at least ten users: use --protocol stream, or a larger file")
    until = np.sort(first, kind="stable")[b]
    by_user = positives[np.argsort(log.users[positives], kind="stable")]
    bounds = np.searchsorted(log.users[by_user], [ordered[b:], ordered[b:] + 1])
    histories = [(user, by_user[lo:hi]) for user, lo, hi in zip(ordered[b:].tolist(), *bounds.tolist(), strict=True)]
    cases = [(user, history) for user, history in histories if len(history) >= NUM_HEAD + MIN_QUERY]
    if not cases:
        raise TooLittleData(f"no user to judge has {NUM_HEAD + MIN_QUERY} events: use --protocol stream")
    fit = np.flatnonzero((log.times < until) & np.isin(log.users, ordered[:a]))
    return StaticCut(fit, np.array([user for user, _ in cases]), tuple(history for _, history in cases))


def _first_times(log: InteractionLog) -> Ints:
    """Time of each user's first positive, by ascending number of the users who have one."""
    users = log.users[log.positive]
    _, index = np.unique(users, return_index=True)  # events are in time order
    times: Ints = log.times[log.positive][index]
    return times


def _positions(log: InteractionLog, events: Ints) -> tuple[Ints, Ints]:
    """K before each event [n]; rows of this and the user's next nine [n, 10], -1 for none and for what comes again."""
    order = np.argsort(log.users[events], kind="stable")
    users, items = log.users[events][order], log.items[events][order]
    start = np.searchsorted(users, users)
    place = np.arange(len(users))[:, None] + np.arange(NEXT)
    inside = np.minimum(place, len(users) - 1)
    mine = (place < len(users)) & (users[inside] == users[:, None])
    found = np.where(mine, items[inside], -1)
    for column in range(1, NEXT):  # a set: what comes again in it does not count again
        found[(found[:, :column] == found[:, column : column + 1]).any(1), column] = -1
    position, following = np.empty(len(users), np.int64), np.empty((len(users), NEXT), np.int64)
    position[order], following[order] = np.arange(len(users)) - start, found
    return position, following
