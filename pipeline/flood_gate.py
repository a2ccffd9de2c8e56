"""Stops a worker before a bad deployment of a producer turns a whole topic into dead letters."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.batching import MicroBatch
from schemas.errors import ConfigurationError


class DeadLetterFlood(ConfigurationError):
    """Most of the recent events were malformed: a bad deployment of a producer must not dead-letter a whole topic."""


class FloodGate:
    """The share of dead letters among the newest events of a worker."""

    def __init__(self, limit: float, window: int) -> None:
        """limit: largest share that may pass; window: events over which it is taken."""
        self._limit, self._window = limit, window
        self._recent: list[tuple[int, int]] = []  # (offsets passed, dead letters) of the newest batches
        self._counted: dict[int, int] = {}  # up to which offset of a partition

    def pass_on(self, batch: MicroBatch) -> None:
        """Count a batch before it is written; what is tried again counts once.

        Raises DeadLetterFlood where too many are malformed.
        """
        fresh = [move for move in batch.advances if move.next_offset > self._counted.get(move.partition, -1)]
        self._counted |= {move.partition: move.next_offset for move in fresh}
        if fresh:
            self._recent.append((sum(move.next_offset - move.start for move in fresh), len(batch.dead_letters)))
            while len(self._recent) > 1 and sum(row[0] for row in self._recent[1:]) >= self._window:
                self._recent.pop(0)
            self._check(letter.reason for letter in batch.dead_letters)

    def give_up(self, reason: str) -> None:
        """Count one more dead letter of the newest batch. Raises DeadLetterFlood, as `pass_on`."""
        num_passed, num_dead = self._recent[-1]
        self._recent[-1] = (num_passed, num_dead + 1)
        self._check([reason])

    def _check(self, reasons: Iterable[str]) -> None:
        seen, dead = (sum(column) for column in zip(*self._recent, strict=True))
        if seen >= self._window and dead > self._limit * seen:
            raise DeadLetterFlood(
                f"{dead} of the last {seen} events are malformed ({', '.join(sorted(set(reasons)))}): mend their "
                "producer, or raise INNERLOOP_DEAD_LETTER_LIMIT to let them pass into dead_letters"
            )
