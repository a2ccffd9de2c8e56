"""What may keep a monitor from seeing: losses that are no numbers, events without a record, a stream that stands still.

`blind` says which of them it is in words, "" while everything can be seen. Without a clock and without a connection of
its own: the monitor says how long nothing has come and how many events wait in the topic.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

log = structlog.get_logger()

UNUSABLE_SHARE, UNUSABLE_LABELS = 0.01, 1000
STILL_SECONDS = 60.0  # without an applied event, after which the broker is asked whether there are any


class Sight:
    """What is known of the monitor's own input. `recent` and `blind` are what is saved of it."""

    def __init__(self, recent: list[list[int]] | None = None, blind: str = "") -> None:
        self.recent = recent or []  # (labels, unusable ones) of the newest pieces
        self.blind = blind
        self._waiting, self._away = 0, ""

    def add(self, labels: int, unusable: int) -> None:
        """Count a piece of the record."""
        self.recent.append([labels, unusable])
        while len(self.recent) > 1 and sum(row[0] for row in self.recent[1:]) >= UNUSABLE_LABELS:
            self.recent.pop(0)

    def wait(self, ends: Mapping[int, int], positions: Mapping[int, int]) -> None:
        """Compare the topic's end offsets with the workers' positions, by partition, when nothing has come for long."""
        behind = [end - positions.get(partition, 0) for partition, end in ends.items()]
        # The last offset of a producer with transactions holds its mark and no event: nobody can be told to apply it.
        self._waiting, self._away = sum(number for number in behind if number > 1), ""

    def lose(self, why: str) -> None:
        """Nothing has come for long, and the broker does not say whether anything should."""
        self._away = why

    def go_on(self) -> None:
        """Something came."""
        self._waiting, self._away = 0, ""

    def look(self, without_record: int) -> None:
        """Say when the input cannot be trusted, and when it can again."""
        blind = self._reason(without_record)
        if blind != self.blind:
            log.warning("blind", reason=blind) if blind else log.info("not blind any more")
        self.blind = blind

    def _reason(self, without_record: int) -> str:
        labels, unusable = (sum(column) for column in zip(*self.recent, strict=True)) if self.recent else (0, 0)
        if without_record:
            return f"{without_record:,} applied events have left no record"
        if unusable >= max(1.0, UNUSABLE_SHARE * labels):
            return f"{unusable:,} of the last {labels:,} losses are no numbers"
        if self._waiting:
            return f"the stream stands still: {self._waiting:,} events wait in the topic, no worker applies them"
        return f"nothing has come for long, and the broker does not answer: {self._away}" if self._away else ""
