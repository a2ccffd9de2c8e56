"""What limits (a): where one micro-batch's time goes, in this process, without Kafka.

The worker's own loop over the real database, each batch computed while the one before is being committed. The functions
named below are wrapped by stopwatches from outside, a part that lies in another is taken off it, and what is in none of
them is "the rest". CPU is that of the whole process: the thread that commits counts where the loop was meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from models.ranker import Ranker
from pipeline import batch_rows, loop
from pipeline.adaptation import Adaptation
from pipeline.inner_rounds import InnerRounds
from pipeline.served_items import ServedItems
from pipeline.store import Store
from tests.benchmarks.measuring import table
from tests.benchmarks.scene import NUM_ITEMS, NUM_USERS, Options, batches, make_loop, one_thread, parameters

PARTS: tuple[tuple[str, Any, str], ...] = (
    ("decode and order", loop, "micro_batch"),
    ("slots, reading users", loop, "admit"),
    ("fates (duplicates)", Adaptation, "_settle_fates"),
    ("support sets, what was known", Adaptation, "_remember"),
    ("item statistics, priors, pairs", ServedItems, "read"),
    ("inner loop: tensors in and out", InnerRounds, "learn"),
    ("inner loop: Ranker.step", Ranker, "step"),
    ("lists: tensors in and out", InnerRounds, "lists"),
    ("lists: Ranker.rank", Ranker, "rank"),
    ("rows: user_state", batch_rows, "states_copy"),
    ("rows: prequential", batch_rows, "prequential_copy"),
    ("rows: everything else", Store, "rows"),
    ("waiting for Postgres", Store, "settle"),
)


class Stopwatch:
    """Wraps functions; `seconds` are wall time in each without the parts inside, `cpu` likewise."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((name for name, _, _ in PARTS), 0.0)
        self.cpu = dict(self.seconds)
        self._open: list[list[float]] = []
        self._restore: list[Callable[[], None]] = []

    def __enter__(self) -> Stopwatch:
        for name, owner, attribute in PARTS:
            original = getattr(owner, attribute)
            setattr(owner, attribute, self._timed(name, original))
            self._restore.append(partial(setattr, owner, attribute, original))
        return self

    def __exit__(self, *_: object) -> None:
        for restore in self._restore:
            restore()

    def _timed(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            inside = [0.0, 0.0]
            self._open.append(inside)
            start, cpu = time.perf_counter(), time.process_time()
            try:
                return original(*arguments, **named)
            finally:
                taken, used = time.perf_counter() - start, time.process_time() - cpu
                self._open.pop()
                self.seconds[name] += taken - inside[0]
                self.cpu[name] += used - inside[1]
                if self._open:
                    self._open[-1][0] += taken
                    self._open[-1][1] += used

        return timed


def measure(options: Options, *, num_events: int, num_users: int, num_items: int, size: int) -> str:
    """A table of microseconds per event; the first half of the events warms up."""
    with options.deploy(num_items, False) as parts:
        held = make_loop(parts.writer_url, parameters(num_items))
        work = list(batches(num_events, size=size, users=num_users, num_items=num_items))
        warm = len(work) // 2
        for chunks in work[:warm]:
            held.begin(chunks)
        with Stopwatch() as watch:
            start, cpu = time.perf_counter(), time.process_time()
            for chunks in work[warm:]:
                held.begin(chunks)
            held.settle()
            seconds, used = time.perf_counter() - start, time.process_time() - cpu
        held.store.close()
    num = sum(len(chunk.records) for chunks in work[warm:] for chunk in chunks)
    rows = [_row(name, watch.seconds[name], watch.cpu[name], num, seconds) for name in watch.seconds]
    rows.append(_row("the rest", seconds - sum(watch.seconds.values()), used - sum(watch.cpu.values()), num, seconds))
    rows.append(_row("together", seconds, used, num, seconds))
    rates = f"{num / seconds:,.0f} events/s, {num / used:,.0f} per CPU-second"
    title = f"where the time goes, micro-batches of {size:,}: {rates}"
    return table(title, ("part", "µs per event", "CPU", "share"), rows)


def _row(name: str, seconds: float, cpu: float, num: int, whole: float) -> list[str]:
    return [name, f"{seconds / num * 1e6:.1f}", f"{cpu / num * 1e6:.1f}", f"{seconds / whole:.0%}"]


def main(options: Options) -> None:
    """Print the tables."""
    one_thread()
    if options.quick:
        print(measure(options, num_events=600, num_users=100, num_items=300, size=100))
        return
    for size in (2048, 256):
        print(measure(options, num_events=60_000, num_users=NUM_USERS, num_items=NUM_ITEMS, size=size), flush=True)
