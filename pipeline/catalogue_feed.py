"""Feeding the catalogue: each line becomes one record of the topic `items`, keyed by its item."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.lines import Line
from pipeline.produce import Outgoing
from schemas.events import Rejected, escaped, parse_item
from schemas.wire import Refusal, json_object

TEXT_PARTS = ("title", "name", "description", "brand", "category", "categories", "genres", "tags")
FIELDS = ("v", "item_id", "text", "attributes", "available")
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def item_record(line: Line) -> Outgoing | Rejected:
    """Convert one line to a record of the contract.

    Without `text`, the columns of TEXT_PARTS that are there make it, in that order; other columns become attributes.
    """
    try:
        message = _message(line)
        item_id = message.get("item_id")
        if isinstance(item_id, int) and not isinstance(item_id, bool):
            item_id = str(item_id)
        key = item_id.encode() if isinstance(item_id, str) else None
        value = msgspec.json.encode(message)
    except Refusal as refusal:
        return refusal.rejected
    except UnicodeEncodeError:
        return Rejected("BAD_ENCODING", "the line is not UTF-8")
    checked = parse_item(key, value)
    return checked if isinstance(checked, Rejected) else Outgoing(key, value, None)


def _message(line: Line) -> dict[str, Any]:
    if line.content is None:
        raise Refusal("BAD_JSON", escaped(line.fault))
    from_csv = isinstance(line.content, dict)
    found: dict[str, Any] = dict(line.content) if isinstance(line.content, dict) else json_object(line.content)
    message: dict[str, Any] = {"v": 1, **{name: found[name] for name in FIELDS if name in found}}
    others = {name: value for name, value in found.items() if name not in FIELDS}
    if from_csv:
        available = str(found.get("available", "true")).strip().lower()
        message["available"] = _TRUTH.get(available, available)
        message["v"] = 1
    if "text" not in message:
        described = _text({name: others.pop(name) for name in TEXT_PARTS if name in others})
        if described:
            message["text"] = described
    if others and "attributes" not in message:
        message["attributes"] = others
    return message


def _text(parts: dict[str, Any]) -> str:
    """Join the parts as sentences would be; lists become words."""
    shown = []
    for part in parts.values():
        words = part if isinstance(part, list) else [part]
        shown.append(", ".join(str(word) for word in words if word not in (None, "")))
    return ". ".join(text for text in shown if text)
