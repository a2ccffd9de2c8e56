"""Interaction and catalogue records: total functions from bytes to a value or a named rejection.

`parse_interaction` reads ordinary events by one typed pass in C and hands everything else to a careful reading of
the same rules in Python. The careful one is the law; whatever the fast one accepts, it accepts with the same result.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from schemas import fields as field
from schemas.event_types import CODES
from schemas.wire import INT64_MAX, MAX_VALUE_BYTES, REASONS, Refusal, Rejected, escaped, json_object, may_be_too_deep

if TYPE_CHECKING:
    from schemas.mapping import Mapping

__all__ = [
    "REASONS",
    "CatalogueItem",
    "Erasure",
    "Interaction",
    "Rejected",
    "Withdrawal",
    "escaped",
    "parse_erasure",
    "parse_interaction",
    "parse_item",
]

INTERACTION_FIELDS = frozenset({"v", "event_id", "user_id", "item_id", "type", "ts", "value", "context"})


class Interaction(msgspec.Struct, frozen=True, gc=False):
    """One event of a user with an item. `ts_ms`: epoch ms, event time.

    De-duplication compares `body_hash` (signed 32 bits, of all fields that the contract names, as they were understood,
    but event_id) and `id_hash` (signed 64 bits, of event_id), both BLAKE2b. `unknown_fields` counts what was ignored.
    `scene` is `context.scene`, where that is fit for an id: the place in the product where the event happened.
    """

    event_id: str
    user_id: str
    item_id: str
    type: str
    ts_ms: int
    value: float | None
    body_hash: int
    id_hash: int
    unknown_fields: int
    scene: str | None = None


class CatalogueItem(msgspec.Struct, frozen=True):
    """What the catalogue says of an item: `text` is what the encoder reads."""

    item_id: str
    text: str
    attributes: dict[str, Any] | None
    available: bool


class Withdrawal(msgspec.Struct, frozen=True):
    """A catalogue record without a value: the item is no longer to be recommended."""

    item_id: str


class Erasure(msgspec.Struct, frozen=True):
    """A user's wish to be forgotten."""

    user_id: str
    requested_at_ms: int


class _Ordinary(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """The shape of an ordinary event; what does not fit goes the careful way."""

    v: int
    event_id: str | int
    user_id: str | int
    item_id: str | int
    type: str
    ts: int | field.AwareDatetime
    value: float | None = None
    context: dict[str, Any] | None = None


_decode_ordinary = msgspec.json.Decoder(_Ordinary).decode
# Not an ordinary event: malformed, not UTF-8 or thousands of digits (ValueError), nested beyond the stack.
_EXTRAORDINARY = (msgspec.DecodeError, ValueError, RecursionError)
_EXACT_INTEGERS = 2**53
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def parse_interaction(
    key: bytes | None, value: bytes | None, timestamp_ms: int, *, mapping: Mapping | None = None
) -> Interaction | Rejected:
    """Read one record of the topic `interactions`; `timestamp_ms` is its Kafka timestamp (negative: it has none).

    With a `mapping` the value is foreign JSON, whose fields are looked up where the mapping says. Never raises.
    """
    if mapping is None:
        ordinary = _parse_ordinary(key, value, timestamp_ms)
        if ordinary is not None:
            return ordinary
    try:
        return _parse_carefully(key, value, timestamp_ms, mapping)
    except Refusal as refusal:
        return refusal.rejected


def parse_item(key: bytes | None, value: bytes | None) -> CatalogueItem | Withdrawal | Rejected:
    """Read one record of the topic `items`; no value withdraws the item that the key names. Never raises."""
    try:
        if value is None:
            return Withdrawal(field.key_text(key, "item_id"))
        found = json_object(value)
        field.check_version(found)
        item_id = field.identifier(found, "item_id")
        text = field.text(found, "text")
        attributes = field.storable("attributes", field.optional_object(found, "attributes"))
        available = field.flag(found, "available", True)
        field.check_key(key, item_id, "item_id")
    except Refusal as refusal:
        return refusal.rejected
    return CatalogueItem(item_id, text, attributes, available)


def parse_erasure(key: bytes | None, value: bytes | None, timestamp_ms: int) -> Erasure | Rejected:
    """Read one record of the topic `erasures`. Never raises."""
    try:
        found = json_object(value)
        field.check_version(found)
        user_id = field.identifier(found, "user_id")
        requested_at_ms = field.event_time(found, "requested_at", timestamp_ms)
        field.check_key(key, user_id, "user_id")
    except Refusal as refusal:
        return refusal.rejected
    return Erasure(user_id, requested_at_ms)


def _parse_ordinary(key: bytes | None, value: bytes | None, timestamp_ms: int) -> Interaction | None:
    if value is None or len(value) > MAX_VALUE_BYTES or may_be_too_deep(value):
        return None
    try:
        found = _decode_ordinary(value)
    except _EXTRAORDINARY:
        return None
    event_id, user_id, item_id = _plain_id(found.event_id), _plain_id(found.user_id), _plain_id(found.item_id)
    ts_ms = found.ts if type(found.ts) is int else field.milliseconds(found.ts)  # type: ignore[arg-type]  # a datetime
    number, context = found.value, found.context
    if (
        not (event_id and user_id and item_id)
        or found.v != 1
        or found.type not in CODES
        or not field.EARLIEST_MS <= ts_ms <= timestamp_ms + field.MAX_AHEAD_MS
        or (number is not None and not -_EXACT_INTEGERS < number < _EXACT_INTEGERS)
        or (context and not _is_flat(context))
        or key != user_id.encode()
    ):
        return None
    # The separator is in none of the parts: ids are free of control characters.
    body_hash = _body_hash(f"{user_id}\x1f{item_id}\x1f{found.type}\x1f{ts_ms}", number, context)
    id_hash, scene = _id_hash(event_id), field.scene(context)
    return Interaction(event_id, user_id, item_id, found.type, ts_ms, number, body_hash, id_hash, 0, scene)


def _parse_carefully(key: bytes | None, value: bytes | None, timestamp_ms: int, mapping: Mapping | None) -> Interaction:
    found = json_object(value)
    if mapping is not None:
        found = mapping.translate(found)
    field.check_version(found)
    event_id, user_id, item_id = (field.identifier(found, name) for name in ("event_id", "user_id", "item_id"))
    name = field.event_type(found)
    ts_ms = field.event_time(found, "ts", timestamp_ms)
    number = field.optional_number(found, "value")
    context = field.optional_object(found, "context")
    field.check_key(key, user_id, "user_id")
    unknown = sum(field_name not in INTERACTION_FIELDS for field_name in found)
    body_hash = _body_hash(f"{user_id}\x1f{item_id}\x1f{name}\x1f{ts_ms}", number, context)
    id_hash, scene = _id_hash(event_id), field.scene(context)
    return Interaction(event_id, user_id, item_id, name, ts_ms, number, body_hash, id_hash, unknown, scene)


def _plain_id(found: str | int) -> str:
    """Return an id as text, or "" where the careful reading has to say what is wrong with it."""
    if type(found) is str:
        return found if field.is_id(found) else ""
    return str(found) if -INT64_MAX <= found <= INT64_MAX else ""  # type: ignore[operator]  # an integer


def _is_flat(context: dict[str, Any]) -> bool:
    # Scalars only, and no number that the two readings understand differently.
    for inner in context.values():
        kind = type(inner)
        if kind is dict or kind is list:
            return False
        if (kind is int or kind is float) and not -_EXACT_INTEGERS < inner < _EXACT_INTEGERS:
            return False
    return True


def _id_hash(event_id: str) -> int:
    return int.from_bytes(blake2b(event_id.encode(), digest_size=8).digest(), "little", signed=True)


def _body_hash(ids: str, number: float | None, context: dict[str, Any] | None) -> int:
    # Adding 0.0 turns -0.0 into 0.0, which is the same value.
    body = f"{ids}\x1f{None if number is None else number + 0.0!r}\x1f{'' if context is None else _canonical(context)}"
    return int.from_bytes(blake2b(body.encode(), digest_size=4).digest(), "little", signed=True)
