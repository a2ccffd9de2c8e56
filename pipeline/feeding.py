"""The wiring of `produce` and `items`: file → records → topic, with a progress bar on a terminal, plain lines else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.lines import Source
from pipeline.outbox import Outbox
from pipeline.produce import Convert, Pace, Tally, produce
from schemas.events import Rejected, escaped

MAX_COMPLAINTS = 20
PLAIN_SECONDS = 5.0
BAR_SECONDS = 0.2


@dataclass(frozen=True)
class Fed:
    """The result of feeding a file."""

    topic: str
    sent: int
    malformed: int
    failed: int
    reasons: dict[str, int]
    seconds: float

    @property
    def complete(self) -> bool:
        """True when every line has arrived."""
        return not self.malformed and not self.failed

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with the rate reached."""
        rate = self.sent / self.seconds if self.seconds else 0.0
        return {**self.__dict__, "seconds": round(self.seconds, 3), "events_per_second": round(rate, 1)}


def feed(broker: str, topic: str, source: Source, convert: Convert, *, pace: Pace, limit: int | None = None) -> Fed:
    """Send the source's first `limit` lines to the topic; faults are reported on standard error as they are found."""
    started = time.monotonic()
    complaints = Complaints()
    with Outbox(broker, topic) as outbox, _shown(source, topic) as progress:
        lines = islice(source, limit)
        tally = produce(lines, outbox, convert, pace=pace, complain=complaints.line, progress=progress)
        outbox.flush()
        seconds = time.monotonic() - started
    for number, reason in sorted(outbox.failures.items()):
        complaints.line(number, Rejected("NOT_DELIVERED", escaped(reason)))
    complaints.rest()
    return Fed(topic, outbox.delivered, tally.malformed, len(outbox.failures), dict(tally.reasons), seconds)


class Complaints:
    """Reports bad lines on standard error, the first MAX_COMPLAINTS of them one by one."""

    def __init__(self) -> None:
        self._num = 0

    def line(self, number: int, rejected: Rejected) -> None:
        """Say what is wrong with one line."""
        self._num += 1
        if self._num <= MAX_COMPLAINTS:
            print(f"line {number}: {rejected.reason}: {rejected.detail}", file=sys.stderr)

    def rest(self) -> None:
        """Say how many more there were."""
        if self._num > MAX_COMPLAINTS:
            print(f"… and {self._num - MAX_COMPLAINTS} more bad lines", file=sys.stderr)


@contextmanager
def _shown(source: Source, topic: str) -> Iterator[Callable[[Tally], None]]:
    if sys.stderr.isatty():
        with _bar(source, topic) as update:
            yield _every(BAR_SECONDS, update)
    else:
        yield _every(PLAIN_SECONDS, lambda tally: _print_line(source, tally))


@contextmanager
def _bar(source: Source, topic: str) -> Iterator[Callable[[Tally], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[sent]:,} sent"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"→ {topic}", total=1.0, sent=0)

        def update(tally: Tally) -> None:
            fraction = source.fraction()
            progress.update(
                task, completed=fraction or 0.0, total=1.0 if fraction is not None else None, sent=tally.sent
            )

        yield update


def _print_line(source: Source, tally: Tally) -> None:
    fraction = source.fraction()
    share = f" ({fraction:.0%})" if fraction is not None else ""
    print(f"{tally.sent:,} sent, {tally.malformed:,} malformed{share}", file=sys.stderr)


def _every(seconds: float, update: Callable[[Tally], None]) -> Callable[[Tally], None]:
    """Call `update` at most once in `seconds`, and look at the clock only every 64th time."""
    last, count = time.monotonic(), 0

    def throttled(tally: Tally) -> None:
        nonlocal last, count
        count += 1
        if count % 64 == 0 and time.monotonic() - last >= seconds:
            last = time.monotonic()
            update(tally)

    return throttled
