"""Seconds and tables: medians of several interleaved runs, because neighbours on the same machine come and go."""

from __future__ import annotations

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Step = Callable[[], object]
_TICKS = os.sysconf("SC_CLK_TCK")


def medians(
    steps: Mapping[str, Step], *, repeats: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each step, the steps taken in turn; CPU seconds of this process unless told otherwise."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if turn:  # the first turn warms up
                seconds[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def cpu_seconds(process_id: int) -> float:
    """User and system time that a process has used; 0 for one that has ended."""
    try:
        text = pathlib.Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def cpu_of_tree(process_id: int) -> float:
    """The same for a process and its children, those included that it has waited for."""
    children = _children(process_id)
    try:
        text = pathlib.Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    fields = text.rpartition(")")[2].split()
    waited_for = (int(fields[13]) + int(fields[14])) / _TICKS
    return cpu_seconds(process_id) + waited_for + sum(cpu_of_tree(child) for child in children)


def seconds_in_queue(process_id: int) -> float:
    """Seconds that a process's threads were ready and had no core: above zero, others took the machine."""
    waited = 0
    for thread in pathlib.Path(f"/proc/{process_id}/task").glob("*/schedstat"):
        try:
            waited += int(thread.read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
    return waited / 1e9


def _children(process_id: int) -> list[int]:
    try:
        threads = list(pathlib.Path(f"/proc/{process_id}/task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, as it stands in LOG.md."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"\n{title}", *lines])
