"""Progress of a long command on standard error: bars on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 5.0


class Stages(Protocol):
    """Shows how far each named stage is."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Say that `done` of `total` steps of a stage are finished; None where nobody knows how many there are."""


def stages() -> PlainStages | BarStages:
    """Return what suits standard error."""
    return BarStages() if sys.stderr.isatty() else PlainStages()


class PlainStages:
    """One line when a stage begins, one when it ends, and one every few seconds within a long one."""

    def __init__(self) -> None:
        self._stage, self._ended, self._last = "", False, time.monotonic()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Say that `done` of `total` steps of a stage are finished."""
        begins, ends = stage != self._stage, total is not None and done >= total
        if begins or (ends and not self._ended) or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._stage, self._ended, self._last = stage, ends, time.monotonic()
            print(f"{stage}: {done:,}{'' if total is None else f' of {total:,}'}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


class BarStages:
    """One bar per stage."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress: Progress = Progress(*columns, console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Say that `done` of `total` steps of a stage are finished."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
