"""How commands print: one JSON value for programs, aligned columns for people; only results go to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of a table.")]


def say(text: str) -> None:
    """Tell the person at the terminal something that is no result."""
    print(text, file=sys.stderr)


def emit_json(value: Any) -> None:
    """Print a result for programs; times and paths become text."""
    print(json.dumps(value, default=_as_text, ensure_ascii=False, indent=2))


def columns(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows under headers, numbers to the right; control characters are shown, not obeyed."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [bool(rows) and all(isinstance(row[at], int | float) for row in rows) for at in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        aligned = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headers), *(line(row) for row in cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(value))


def _as_text(value: Any) -> str:
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
