"""The monitor's findings as a picture: loss over time, changes that detectors found, decisions, versions."""

from __future__ import annotations

import base64
import io
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.drift_reading import History, in_words
from schemas.errors import ConfigurationError

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>innerloop: drift, decisions, versions</title><style>
:root {{ color-scheme: light }}
body {{ font: 15px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1d2733; background: #fff }}
body {{ max-width: 1000px; margin: 0 auto; padding: 24px 20px 48px }}
h1 {{ font-size: 24px; margin: 0 0 12px }} h2 {{ font-size: 18px; margin: 24px 0 8px }} img {{ max-width: 100% }}
pre {{ background: #f6f7f9; border-radius: 8px; padding: 12px 16px; font-size: 13px; white-space: pre-wrap }}
</style></head><body><h1>Drift: what was found, and what was decided</h1>
<img alt="loss, what the detectors saw, decisions and versions over time" src="data:image/png;base64,{image}">
<h2>The newest decisions</h2>
{decisions}</body></html>
"""
_MOST_WORDS = 20
ADAPTED, START, WORSE, BETTER, VERSION = "#0b6e4f", "#6fb98f", "#c8553d", "#7a8a99", "#3b5b92"
_MARKS = {"retrain": ("^", WORSE), "wait": (".", BETTER), "no": ("x", BETTER)}


class PictureUnavailable(ConfigurationError):
    """matplotlib is not installed, or the file is neither .png nor .html: the message says which to mend."""


def check(path: Path) -> None:
    """Raise PictureUnavailable where `save` would."""
    if path.suffix not in (".png", ".html"):
        raise PictureUnavailable(f"--out draws .png or .html, not {path.suffix or 'a name without an ending'}")
    if find_spec("matplotlib") is None:
        raise PictureUnavailable("--out draws with matplotlib: pip install 'innerloop[report]'")


def save(found: History, path: Path) -> None:
    """Draw to a .png, or to an .html that holds one and the decisions in words. Raises PictureUnavailable."""
    check(path)
    payload = png(found)
    if path.suffix == ".html":
        words = [f"<pre>{escape(in_words(decision))}</pre>" for decision in found.decisions[:_MOST_WORDS]]
        image, decisions = base64.b64encode(payload).decode(), "\n".join(words) or "<p>None yet.</p>"
        payload = _PAGE.format(image=image, decisions=decisions).encode()
    path.write_bytes(payload)


def png(found: History) -> bytes:
    """The picture's bytes."""
    from matplotlib.figure import Figure

    figure, out = Figure(figsize=(11, 6), layout="constrained"), io.BytesIO()
    losses, events = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_losses(losses, found)
    _draw_findings(events, found)
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _draw_losses(axes: Any, found: History) -> None:
    rows = found.losses[::-1]
    at = [row["hour"] for row in rows]
    for name, colour, label in (("adapted", ADAPTED, "adapted"), ("start", START, "start, un-adapted")):
        axes.plot(at, [row[name] / row["labels"] for row in rows], color=colour, lw=1.6, label=label)
    for version in found.versions:
        axes.axvline(version["activated_at"], color=VERSION, lw=0.9, ls=(0, (4, 3)))
        axes.annotate(
            f"version {version['version']}", (version["activated_at"], 1), xycoords=("data", "axes fraction"),
            rotation=90, va="top", ha="right", fontsize=8, color=VERSION,
        )  # fmt: skip
    axes.set_ylabel("loss per label, nats")
    axes.legend(frameon=False)
    axes.grid(axis="y", color="#e4e8ec")


def _draw_findings(axes: Any, found: History) -> None:
    names = sorted({alarm["series"] for alarm in found.alarms}, reverse=True)
    rows = {name: place for place, name in enumerate(["decision", *names])}
    for alarm in found.alarms:
        colour = WORSE if alarm["worse"] else BETTER
        axes.plot([alarm["record_at"]], [rows[alarm["series"]]], "|", ms=9, mew=2, color=colour)
    for decision in found.decisions:
        mark, colour = _MARKS[decision["verdict"]]
        axes.plot([decision["record_at"]], [rows["decision"]], mark, ms=7, color=colour)
    axes.set_yticks(list(rows.values()), list(rows), fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("UTC;  | worse (red) or better,  ▲ retrain, x no, · wait")
