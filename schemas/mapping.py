"""Reading a foreign clickstream: a TOML file says where each field is found in its JSON and what its event names mean.

event_time_unit = "ms"            # or "s", for numbers; RFC 3339 text needs no unit
dismiss_below = 3                 # optional: a rating with a lower value is a dismissal

[fields]                          # dotted paths; a number descends into an array
event_id = "uuid"
user_id = "user.id"
item_id = "products.0.sku"
type = "event_name"
ts = "sent_at"
value = "properties.stars"        # optional, as is context

[types]                           # their event names → ours; without this table the names are ours
"Product Viewed" = "view"
"Order Completed" = "purchase"
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from schemas.errors import MappingInvalid
from schemas.event_types import CODES, NAMES
from schemas.wire import INT64_MAX, Refusal, escaped

REQUIRED = ("event_id", "user_id", "item_id", "type", "ts")
OPTIONAL = ("value", "context")
UNITS = {"ms": 1, "s": 1000}
_PLACE = re.compile(r"[0-9]{1,5}")
_ABSENT = object()

Steps = tuple[str, ...]


@dataclass(frozen=True)
class Mapping:
    """Where the contract's fields are found in foreign JSON, and what its event names mean."""

    fields: dict[str, Steps]
    types: dict[str, str] = field(default_factory=dict)
    milliseconds_per_unit: int = 1
    dismiss_below: float | None = None

    def translate(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return the message of the contract that `found` stands for; its values are not yet checked.

        A required field that is not where the mapping says is MISSING_FIELD, an event name without a meaning BAD_TYPE.
        """
        message: dict[str, Any] = {"v": 1}
        for name, path in self.fields.items():
            inner = _look_up(found, path)
            if inner is not _ABSENT:
                message[name] = inner
            elif name in REQUIRED:
                raise Refusal("MISSING_FIELD", f"{name} is missing: nothing at {'.'.join(path)}")
        message["type"] = self._type_of(message)
        if type(message["ts"]) in (int, float):
            message["ts"] = self._epoch_ms(message["ts"])
        return message

    def _type_of(self, message: dict[str, Any]) -> Any:
        name = message["type"]
        if self.types and isinstance(name, str):
            if name not in self.types:
                raise Refusal("BAD_TYPE", "type is an event name that the mapping's [types] does not list")
            name = self.types[name]
        value = message.get("value")
        if name == "rating" and self.dismiss_below is not None and isinstance(value, int | float):
            return "dismiss" if value < self.dismiss_below else name
        return name

    def _epoch_ms(self, ts: float) -> int | float:
        if self.milliseconds_per_unit == 1:
            return ts  # a float is BAD_TYPE here, as in the contract; only seconds may have a fraction
        if abs(ts) > INT64_MAX:
            raise Refusal("OUT_OF_RANGE", "ts is beyond 64 bits")
        return int(ts * self.milliseconds_per_unit)


def load_mapping(path: Path) -> Mapping:
    """Read a mapping file; raises MappingInvalid, which names the file and the entry."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MappingInvalid(f"mapping {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MappingInvalid(f"mapping {path}: not UTF-8 at byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise MappingInvalid(f"mapping {path}: {error}") from error
    try:
        return parse_mapping(content)
    except MappingInvalid as error:
        raise MappingInvalid(f"mapping {path}: {error}") from None


def parse_mapping(content: dict[str, Any]) -> Mapping:
    """Check the content of a mapping file; raises MappingInvalid, which names the entry."""
    _refuse_unknown(content, ("fields", "types", "event_time_unit", "dismiss_below"), "the file")
    unit = content.get("event_time_unit", "ms")
    if not isinstance(unit, str) or unit not in UNITS:
        raise MappingInvalid(f"event_time_unit must be one of {', '.join(UNITS)}")
    limit = content.get("dismiss_below")
    if limit is not None and (type(limit) not in (int, float) or not isfinite(limit)):
        raise MappingInvalid("dismiss_below must be a finite number")
    fields = _checked_fields(_table(content, "fields"))
    if limit is not None and "value" not in fields:
        raise MappingInvalid("dismiss_below needs [fields] value, which it compares")
    return Mapping(fields, _checked_types(_table(content, "types")), UNITS[unit], limit)


def _checked_fields(table: dict[str, Any]) -> dict[str, Steps]:
    _refuse_unknown(table, (*REQUIRED, *OPTIONAL), "[fields]")
    for name in REQUIRED:
        if name not in table:
            raise MappingInvalid(f"[fields] lacks {name}")
    for name, path in table.items():
        if not isinstance(path, str) or not all(path.split(".")):
            raise MappingInvalid(f'[fields] {name} must be a dotted path, as in "user.id"')
    return {name: tuple(path.split(".")) for name, path in table.items()}


def _checked_types(table: dict[str, Any]) -> dict[str, str]:
    for name, meaning in table.items():
        if not isinstance(meaning, str) or meaning not in CODES:
            raise MappingInvalid(f'[types] "{escaped(name, 80)}" must be one of {", ".join(NAMES)}')
    return dict(table)


def _table(content: dict[str, Any], name: str) -> dict[str, Any]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise MappingInvalid(f"{name} must be a table: [{name}]")
    return table


def _refuse_unknown(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in table:
        if name not in known:
            raise MappingInvalid(f"{where} has an unknown entry {escaped(name, 80)}; known: {', '.join(known)}")


def _look_up(found: Any, path: Steps) -> Any:
    for step in path:
        if isinstance(found, dict) and step in found:
            found = found[step]
        elif isinstance(found, list) and _PLACE.fullmatch(step) and int(step) < len(found):
            found = found[int(step)]
        else:
            return _ABSENT
    return found
