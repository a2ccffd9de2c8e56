"""A mapping for files that nobody has described: columns by their usual names, times by their size.

A mapping file (`--mapping`) is always the better answer; this one says what it took for what.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from schemas.mapping import Mapping

ALIASES = {  # in lower case and without what is neither letter nor digit: "Customer ID" is customerid
    "user_id": ("userid", "user", "uid", "visitorid", "customerid", "memberid", "accountid", "reviewerid"),
    "item_id": ("itemid", "item", "movieid", "productid", "articleid", "newsid", "sku", "stockcode", "asin"),
    "ts": ("ts", "timestamp", "time", "eventtime", "datetime", "date", "tdat", "createdat", "invoicedate"),
    "type": ("type", "event", "eventtype", "action"),
    "value": ("value", "rating", "score", "overall"),
    "event_id": ("eventid", "uuid"),
}
LONG_AGO_MS = 1_577_836_800_000  # 2020: a file that begins before it may hold events from before 2000 further down
SECONDS_BELOW = 10**11  # an epoch time below it is in seconds: as milliseconds it would lie in 1973
LATER_MS = 788_940_000_000  # 25 years of 365.25 days: order and distances stay


@dataclass(frozen=True)
class GuessedColumns(Mapping):
    """A mapping whose type may be the same for all lines, and whose times may be moved into this century."""

    every_type: str | None = None
    later_ms: int = 0

    def translate(self, found: dict[str, Any]) -> dict[str, Any]:
        """As `Mapping.translate`; a time without an offset is taken as UTC, 17.0 as 17 in an id."""
        message = super().translate({"type": self.every_type, **found} if self.every_type else found)
        for name in ("user_id", "item_id"):  # a column of numbers with gaps comes out of pandas as floats
            if isinstance(message[name], float) and message[name].is_integer():
                message[name] = int(message[name])
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
            taken.append("times are moved 25 years later (a stream refuses events from before 2000)")
        return ", ".join(taken)


def guess_columns(row: dict[str, Any]) -> GuessedColumns | None:
    """Find the columns by a first row; None where user, item or time is not to be found."""
    names = {re.sub("[^a-z0-9]", "", name.lower()): name for name in row}
    found = {field: names[alias] for field, aliases in ALIASES.items() if (alias := _first(aliases, names))}
    if not {"user_id", "item_id", "ts"} <= found.keys():
        return None
    every_type = None if "type" in found else ("rating" if "value" in found else "click")
    unit = 1000 if 0 <= _number(row[found["ts"]]) < SECONDS_BELOW else 1
    paths = {"event_id": "line_id", "type": "type", **found}
    fields: dict[str, tuple[str, ...]] = {name: (path,) for name, path in paths.items()}
    guessed = GuessedColumns(fields, milliseconds_per_unit=unit, every_type=every_type)
    first = guessed.translate({"line_id": "0", **row})["ts"] if _is_time(row[found["ts"]]) else LONG_AGO_MS
    late = LATER_MS if type(first) is int and first < LONG_AGO_MS else 0
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
