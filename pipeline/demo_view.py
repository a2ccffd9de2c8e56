"""What the demo shows: a live view while events stream, and a summary at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pipeline.demo_drift import Cure
from pipeline.demo_figures import KINDS, Gain, Score
from pipeline.reading import PartitionStatus, Recommendation

PLAIN_SECONDS = 5.0
NAMES = {"adapted": "adapted", "start": "un-adapted", "popular": "popularity"}


@dataclass(frozen=True)
class Moment:
    """The stream at one moment; freshness in milliseconds, None before the first event."""

    sent: int
    total: int
    applied: int
    per_second: float
    lag: int
    p50_ms: float | None
    p99_ms: float | None
    score: Score


@dataclass(frozen=True)
class Summary:
    """What the demo ends with."""

    num_events: int
    num_users: int
    hit_rates: dict[str, float]
    gains: dict[str, Gain]
    law: list[PartitionStatus]
    lag: int
    p50_ms: float
    p99_ms: float
    user_id: str
    lessons: list[str]
    before: list[Recommendation]
    after: list[Recommendation]
    later: frozenset[str]
    titles: dict[str, str]
    cure: Cure
    seconds: float
    home: str | None

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain = asdict(self) | {"later": sorted(self.later)}
        del plain["titles"]
        plain["law"] = [{name: value for name, value in row.items() if name != "updated_at"} for row in plain["law"]]
        return plain


class Show(Protocol):
    """Draws a moment."""

    def __call__(self, moment: Moment) -> None:
        """Show it, or leave it out when the last one was only just shown."""


@contextmanager
def live() -> Iterator[Show]:
    """Draw on a terminal; elsewhere print a line every few seconds. On standard error: the summary alone is output."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as screen:
        yield lambda moment: screen.update(_panel(moment))


class _Lines:
    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, moment: Moment) -> None:
        """Print a line, at most one in PLAIN_SECONDS."""
        if time.monotonic() - self._last < PLAIN_SECONDS:
            return
        self._last = time.monotonic()
        rates = ", ".join(f"{NAMES[kind]} {moment.score.rate(kind):.3f}" for kind in KINDS)
        print(
            f"{moment.applied:,} of {moment.total:,} events, {moment.per_second:,.0f}/s, {_fresh(moment)}, "
            f"lag {moment.lag:,}, hit rate@10: {rates}",
            file=sys.stderr,
            flush=True,
        )


def _fresh(moment: Moment) -> str:
    if moment.p50_ms is None or moment.p99_ms is None:
        return "no scores yet"
    return f"freshness p50 {moment.p50_ms:.0f} ms p99 {moment.p99_ms:.0f} ms"


def _panel(moment: Moment) -> Any:
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(width=14)
    table.add_column(width=44)
    table.add_column()
    table.add_row(
        "streamed", ProgressBar(moment.total, moment.applied, width=42), f"{moment.applied:,}/{moment.total:,}"
    )
    table.add_row("events/s", f"{moment.per_second:,.0f}", "")
    table.add_row("freshness", _fresh(moment).removeprefix("freshness "), "event → scores in Postgres")
    table.add_row("lag", f"{moment.lag:,}", "sent, not yet in Postgres")
    rates = {kind: moment.score.rate(kind) for kind in KINDS}
    # Bars compare the three lists with each other; how good a hit rate can be differs from stream to stream.
    widest = 1.1 * max(rates.values()) or 1.0
    for kind, rate in rates.items():
        table.add_row(NAMES[kind], ProgressBar(widest, rate, width=42), f"{rate:.3f}")
    note = "hit rate@10 of the next item, each list made before the event was learnt"
    return Panel(table, title="innerloop: clicks in, adapted scores out", subtitle=note, width=100)


def text(summary: Summary) -> str:
    """Return the summary for people."""
    return "\n".join(
        [
            "",
            f"A newcomer, user {summary.user_id}, before and after five events",
            *(f"  learnt    {lesson}" for lesson in summary.lessons),
            *_lists(summary),
            "",
            *_law(summary),
            "",
            *_earned(summary),
            "",
            *summary.cure.as_text(),
            "",
            *_query(summary),
        ]
    )


def _lists(summary: Summary) -> list[str]:
    def title(item: Recommendation) -> str:
        return summary.titles.get(item.item_id, item.item_id)[:44]

    width = max((len(title(item)) for item in summary.before), default=10)
    lines = [f"      {'before (popular)':{width + 2}}    after ({summary.after[0].source})"]
    for rank, (old, new) in enumerate(zip(summary.before, summary.after, strict=False), 1):
        marks = ["*" if item.item_id in summary.later else " " for item in (old, new)]
        lines.append(f"  {rank:2}  {marks[0]} {title(old):{width}}  {marks[1]} {title(new)}")
    found = [sum(item.item_id in summary.later for item in items) for items in (summary.before, summary.after)]
    lines.append(f"  * chosen by this user later on: {found[0]} of the list before, {found[1]} of the list after")
    return lines


def _law(summary: Summary) -> list[str]:
    lines = ["The law: next - first = applied + dead-lettered + duplicates + dropped + skipped"]
    for row in summary.law:
        fates = f"{row.applied} + {row.dead_lettered} + {row.duplicates} + {row.dropped} + {row.skipped}"
        verdict = "BROKEN" if row.broken else "holds"
        lines.append(f"  partition {row.partition}: {row.next_offset} - {row.first_offset} = {fates}   {verdict}")
    return [*lines, f"  lag {summary.lag}"]


def _earned(summary: Summary) -> list[str]:
    rates = ", ".join(f"{NAMES[kind]} {rate:.4f}" for kind, rate in summary.hit_rates.items())
    names = {
        "hit_rate_over_start": "adapted over un-adapted, hit rate@10",
        "hit_rate_over_popular": "adapted over popularity, hit rate@10",
        "loss_under_start": "adapted under un-adapted, loss in nats",
    }
    rows = [f"  {names[name]:40} {g.mean:+.4f}  [{g.low:+.4f}, {g.high:+.4f}]" for name, g in summary.gains.items()]
    return [
        f"What adaptation earned, on {summary.num_events:,} events of {summary.num_users} users never trained on, each",
        "predicted before it was learnt (mean per event, 95 % bootstrap interval over users)",
        f"  hit rate@10 of the next item: {rates}",
        *rows,
        f"  freshness, event to scores in Postgres: p50 {summary.p50_ms:.0f} ms, p99 {summary.p99_ms:.0f} ms",
    ]


def _query(summary: Summary) -> list[str]:
    sql = f"SELECT * FROM innerloop.recommend('{summary.user_id}', 10)"  # noqa: S608 - shown, not run
    if summary.home is None:
        return [
            "How to query it: keep a run with `innerloop demo --home DIR`, then with INNERLOOP_HOME=DIR",
            f"  innerloop services up; innerloop recommend {summary.user_id}; innerloop status",
            f"  any SQL client, as a reader: {sql}",
            f"Everything was stopped and removed. {summary.seconds:.0f} s in all.",
        ]
    return [
        f"How to query it: export INNERLOOP_HOME={summary.home}; innerloop services up",
        f"  innerloop recommend {summary.user_id}",
        f"  any SQL client, as a reader: {sql}",
        f"What was started is stopped. {summary.seconds:.0f} s in all.",
    ]
