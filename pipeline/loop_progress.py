"""How far a worker's partitions are, and the one batch that is on its way into the database.

A batch is computed while the one before it is being committed: memory is past that one, whose transaction may still
fail. Then everything since the durable positions is forgotten and done again; since rows do not depend on how a log is
cut, nothing has to be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.batch_rows import BatchRows
from pipeline.batching import Advance, MicroBatch
from pipeline.chunks import Place
from pipeline.session import Fenced
from pipeline.store import Store
from pipeline.support import Ints

Committed = Callable[[MicroBatch, Ints, float], object]  # a batch, its users' adapter use, when in ms


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch that is being committed, with the use of its users' adapters, and the positions that it ends at."""

    batch: MicroBatch
    adapter_use: Ints
    ends: dict[Place, int]


class Progress:
    """Positions of the partitions held: computed up to `positions`, in the database up to `durable`."""

    def __init__(self, store: Store, committed: Committed) -> None:
        """Hold nothing; `committed` is told of every batch that is known to be in the database."""
        self.positions: dict[Place, int] = {}
        self.durable: dict[Place, int] = {}
        self._store, self._committed = store, committed
        self._flight: _Flight | None = None
        self._intended: dict[Place, int] = {}
        self._news: dict[Place, int] = {}

    def held(self, topic: str) -> dict[int, int]:
        """Computed positions of the partitions held, of one topic."""
        return {partition: at for (name, partition), at in self.positions.items() if name == topic}

    def start(self, place: Place, offset: int) -> None:
        """Go on with a partition from a durable offset."""
        self.positions[place] = self.durable[place] = offset

    def drop(self, place: Place) -> None:
        """A partition is no longer held."""
        del self.positions[place], self.durable[place]
        self._news.pop(place, None)

    def intend(self, moves: Sequence[Advance]) -> None:
        """Note where the next transaction leads: should its answer be lost, it may have been committed."""
        self._intended = _ends(moves)

    def moved(self, moves: Sequence[Advance]) -> None:
        """Note that a transaction has been committed."""
        self.positions |= _ends(moves)
        self._arrived(_ends(moves))

    def begin(self, batch: MicroBatch, adapter_use: Ints, rows: BatchRows) -> None:
        """Send a computed batch on its way, once the one before has arrived; raises what that one failed by."""
        self.settle()
        self.intend(batch.advances)
        self._flight = _Flight(batch, adapter_use, _ends(batch.advances))
        self._store.write(rows)
        self.positions |= self._flight.ends

    def settle(self) -> None:
        """Wait for the batch that is on its way; raises what it failed by."""
        flight, self._flight = self._flight, None
        committed_at = self._store.settle()
        if flight and committed_at is not None:
            self._arrived(flight.ends)
            self._committed(flight.batch, flight.adapter_use, committed_at * 1000)

    def found(self, place: Place, offset: int) -> None:
        """Go on from where the database says a partition is.

        Raises:
            Fenced: another worker has moved it meanwhile.

        """
        before = self.durable[place]
        if offset not in {before, self._intended.get(place, before)}:
            raise Fenced(f"{place[0]}[{place[1]}] is at {offset}, this worker left it at {before}")
        self.positions[place] = offset
        self._arrived({place: offset})

    def news(self) -> dict[Place, int]:
        """Give the positions that have become durable since the last call."""
        news, self._news = self._news, {}
        return news

    def _arrived(self, ends: Mapping[Place, int]) -> None:
        self.durable |= ends
        self._news |= ends


def _ends(moves: Sequence[Advance]) -> dict[Place, int]:
    return {(move.topic, move.partition): move.next_offset for move in moves}
