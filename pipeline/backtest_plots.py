"""Plots of a backtest as inline SVG, by matplotlib, in the colours of the page that holds them, light or dark.

Colours are told apart by people who see few of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from models.figures import Interval
from schemas.errors import ConfigurationError

ADAPTED, START, BEST, QUIET = "#0b6e4f", "#6fb98f", "#c8553d", "#a8b0ba"
INK, FAINT = "#1d2733", "#e4e8ec"
# By the name of the page's variable: the colour on a light page, as it is drawn, and on a dark one.
COLOURS = {
    "adapted": (ADAPTED, "#5fd3a2"),
    "start": (START, "#2f8f6a"),
    "best": (BEST, "#f0836b"),
    "quiet": (QUIET, "#6b7682"),
    "ink": (INK, "#dfe6ee"),
    "faint": (FAINT, "#2f3944"),
}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "innerloop",  # the same figures give the same bytes
    "svg.fonttype": "path",
}


class PlotsUnavailable(ConfigurationError):
    """matplotlib is not installed: install the extra that the message names, or take --json instead."""


def check_available() -> None:
    """Raises PlotsUnavailable before any work is done."""
    if find_spec("matplotlib") is None:
        raise PlotsUnavailable("--out draws with matplotlib: pip install 'innerloop[report]', or take --json instead")


class Drawing:
    """One figure being drawn; `svg` once its block has ended."""

    svg: str = ""
    axes: Any = None


@contextmanager
def _drawing(width: float, height: float) -> Iterator[Drawing]:
    import matplotlib
    from matplotlib.figure import Figure

    drawing, out = Drawing(), io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        drawing.axes = figure.subplots()
        yield drawing
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    for name, (drawn, _) in COLOURS.items():
        svg = svg.replace(drawn, f"var(--{name})")
    drawing.svg = svg


def lines_over_k(labels: Sequence[str], series: Mapping[str, tuple[Sequence[Interval], str]], ylabel: str) -> str:
    """Means with their intervals over buckets of K; series: name → (intervals, colour)."""
    with _drawing(7.2, 3.5) as drawing:
        for place, (name, (rows, colour)) in enumerate(series.items()):
            shift = (place - (len(series) - 1) / 2) * 0.06
            x = [at + shift for at in range(len(rows))]
            errors = [[row.mean - row.low for row in rows], [row.high - row.mean for row in rows]]
            drawing.axes.errorbar(
                x, [row.mean for row in rows], errors, label=name, color=colour, marker="o", ms=4, lw=1.6, elinewidth=1
            )
        drawing.axes.set_xticks(range(len(labels)), labels)
        drawing.axes.set_xlabel("events that the user had before (K)")
        drawing.axes.set_ylabel(ylabel)
        drawing.axes.set_ylim(bottom=0)
        drawing.axes.legend()
    return drawing.svg


def bars_with_intervals(labels: Sequence[str], rows: Sequence[Interval], xlabel: str) -> str:
    """Differences with their intervals, one line each; what is told from zero is in colour."""
    with _drawing(7.2, 0.9 + 0.36 * len(rows)) as drawing:
        for place, row in enumerate(rows):
            colour = ADAPTED if row.low > 0 else BEST if row.high < 0 else QUIET
            drawing.axes.plot([row.low, row.high], [place, place], color=colour, lw=2.2, solid_capstyle="round")
            drawing.axes.plot([row.mean], [place], "o", color=colour, ms=6)
        drawing.axes.axvline(0, color=INK, lw=0.8)
        drawing.axes.set_yticks(range(len(labels)), labels)
        drawing.axes.set_ylim(len(rows) - 0.5, -0.5)
        drawing.axes.grid(axis="x", color=FAINT)
        drawing.axes.grid(visible=False, axis="y")
        drawing.axes.figure.supxlabel(xlabel, fontsize=9.5)  # centred on the whole width: long labels leave little
    return drawing.svg


def calibration(bins: Sequence[tuple[float, float, int]]) -> str:
    """Predicted against observed share of hits."""
    with _drawing(3.5, 3.3) as drawing:
        top = max([0.01, *(max(score, hits) for score, hits, _ in bins)]) * 1.08
        drawing.axes.plot([0, top], [0, top], color=QUIET, lw=1, ls=(0, (4, 3)))
        drawing.axes.plot([row[0] for row in bins], [row[1] for row in bins], "o-", color=ADAPTED, ms=4.5, lw=1.4)
        drawing.axes.set_xlim(0, top)
        drawing.axes.set_ylim(0, top)
        drawing.axes.set_xlabel("score served")
        drawing.axes.set_ylabel("taken among the next ten")
    return drawing.svg
