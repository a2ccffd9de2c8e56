"""A mapping for files that nobody has described: columns by their usual names, times by their size.

A mapping file (`--mapping`) is always the better answer; this one says what it took for what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from schemas.mapping import Mapping

ALIASES: dict[str, tuple[str, ...]] = {
    "user_id": ("user_id", "userid", "user", "uid", "visitorid", "visitor_id", "customer_id", "account_id"),
    "item_id": ("item_id", "itemid", "item", "movieid", "movie_id", "product_id", "productid", "article_id", "sku"),
    "ts": ("ts", "timestamp", "time", "event_time", "datetime", "date", "t_dat", "created_at"),
    "type": ("type", "event", "event_type", "action"),
    "value": ("value", "rating", "score"),
    "event_id": ("event_id", "uuid"),
}
FIRST_YEAR_MS = 946_684_800_000  # 2000: events before it are refused as a confusion of units
SECONDS_BELOW = 10**11  # an epoch time below it is in seconds: as milliseconds it would lie in 1973
LATER_MS = 788_940_000_000  # 25 years of 365.25 days: order and distances stay


@dataclass(frozen=True)
class GuessedColumns(Mapping):
    """A mapping whose type may be the same for all lines, and whose times may be moved into this century."""

    every_type: str | None = None
    later_ms: int = 0

    def translate(self, found: dict[str, Any]) -> dict[str, Any]:
        """As `Mapping.translate`; a time without an offset is taken as UTC."""
        message = super().translate({"type": self.every_type, **found} if self.every_type else found)
        if isinstance(message["ts"], str):
            number = _number(message["ts"])
            message["ts"] = int(number * self.milliseconds_per_unit) if number >= 0 else _milliseconds(message["ts"])
        if self.later_ms and type(message["ts"]) is int:
            message["ts"] += self.later_ms
        return message

    def as_text(self) -> str:
        """What was taken for what."""
        taken = [f"{name} from {path[0]!r}" for name, path in self.fields.items() if path[0] not in (name, "line_id")]
        if self.every_type:
            taken.append(f"every event is a {self.every_type}")
        if self.later_ms:
            taken.append("times are moved 25 years later (the stream refuses events from before 2000)")
        return ", ".join(taken)


def guess_columns(row: dict[str, Any]) -> GuessedColumns | None:
    """Find the columns by a first row; None where user, item or time is not to be found."""
    names = {name.lower(): name for name in row}
    found = {field: names[alias] for field, aliases in ALIASES.items() if (alias := _first(aliases, names))}
    if not {"user_id", "item_id", "ts"} <= found.keys():
        return None
    every_type = None if "type" in found else ("rating" if "value" in found else "click")
    unit = 1000 if 0 <= _number(row[found["ts"]]) < SECONDS_BELOW else 1
    paths = {"event_id": "line_id", "type": "type", **found}
    fields: dict[str, tuple[str, ...]] = {name: (path,) for name, path in paths.items()}
    guessed = GuessedColumns(fields, milliseconds_per_unit=unit, every_type=every_type)
    early = guessed.translate({"line_id": "0", **row})["ts"] if _is_time(row[found["ts"]]) else FIRST_YEAR_MS
    late = LATER_MS if type(early) is int and early < FIRST_YEAR_MS else 0
    return GuessedColumns(fields, milliseconds_per_unit=unit, every_type=every_type, later_ms=late)


def _first(aliases: Iterable[str], names: dict[str, str]) -> str | None:
    return next((alias for alias in aliases if alias in names), None)


def _number(cell: object) -> float:
    """The cell as a number, -1 where it is none."""
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return -1.0


def _is_time(cell: object) -> bool:
    return _number(cell) >= 0 or (isinstance(cell, str) and isinstance(_milliseconds(cell), int))


def _milliseconds(text: str) -> int | str:
    """Epoch ms of an ISO 8601 or numeric text; the text itself, for the decoder to name, where it is neither."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
