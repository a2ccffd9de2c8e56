"""The fields of a message, one checked function each; all raise `wire.Refusal`, whose detail names the field."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from math import isfinite
from typing import Annotated, Any

import msgspec

from schemas.event_types import CODES, NAMES
from schemas.wire import INT64_MAX, INT64_MIN, Refusal

MAX_ID_BYTES = 128
MAX_AHEAD_MS = 5 * 60 * 1000
EARLIEST_MS = 946_684_800_000  # 2000-01-01T00:00:00Z
# Where a record has no Kafka timestamp to compare with, times of another unit must still be caught: 2100-01-01.
LATEST_MS = 4_102_444_800_000

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
AwareDatetime = Annotated[datetime, msgspec.Meta(tz=True)]
# Control characters (Unicode Cc) and lone surrogates.
_NOT_IN_ID = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")
_LEAP_SECOND = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]23:59:)60(?=[.Zz+-])", re.ASCII)
_KINDS = {bool: "a boolean", type(None): "null", str: "a string", dict: "an object", list: "an array", float: "a float"}


def required(fields: dict[str, Any], name: str) -> Any:
    """Return a field that must be there; MISSING_FIELD names it."""
    try:
        return fields[name]
    except KeyError:
        raise Refusal("MISSING_FIELD", f"{name} is missing") from None


def check_version(fields: dict[str, Any]) -> None:
    """Accept version 1; another one is UNKNOWN_VERSION, which a later innerloop can replay."""
    version = required(fields, "v")
    if type(version) is not int:
        raise _wrong_type("v", version, "an integer")
    if not INT64_MIN <= version <= INT64_MAX:
        raise Refusal("OUT_OF_RANGE", "v is beyond 64 bits")
    if version != 1:
        raise Refusal("UNKNOWN_VERSION", "v is not 1, the only version that this innerloop reads")


def identifier(fields: dict[str, Any], name: str) -> str:
    """Return an id: a string of 1 to 128 bytes without control characters, or an int64 in decimal."""
    found = required(fields, name)
    if type(found) is int:
        if not INT64_MIN <= found <= INT64_MAX:
            raise Refusal("OUT_OF_RANGE", f"{name} is an integer beyond 64 bits")
        return str(found)
    if type(found) is not str:
        raise _wrong_type(name, found, "a string or an integer")
    if not is_id(found):
        raise Refusal("BAD_ID", f"{name} is not 1 to {MAX_ID_BYTES} bytes without control characters")
    return found


def scene(context: dict[str, Any] | None) -> str | None:
    """Return the context's `scene` where it could be an id; anything else is no scene, and no fault."""
    found = context.get("scene") if context else None
    return found if type(found) is str and is_id(found) else None


def is_id(text: str) -> bool:
    """Say whether `text` can be an id."""
    if text.isascii() and text.isprintable():
        return 0 < len(text) <= MAX_ID_BYTES
    return _NOT_IN_ID.search(text) is None and len(text.encode()) <= MAX_ID_BYTES


def key_text(key: bytes | None, name: str) -> str:
    """Return a record's key as an id, for records whose key is all they have."""
    if key is None:
        raise Refusal("KEY_MISMATCH", f"the record has no key, it must be the {name}")
    try:
        text = key.decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal("BAD_ENCODING", "the key is not UTF-8") from None
    if not is_id(text):
        raise Refusal("BAD_ID", f"the key is not 1 to {MAX_ID_BYTES} bytes without control characters")
    return text


def check_key(key: bytes | None, expected: str, name: str) -> None:
    """Refuse a record whose key is not its own id: the key chose the partition, and partitions are fenced apart."""
    if key != expected.encode():
        raise Refusal("KEY_MISMATCH", f"the record's key is not its {name}")


def event_type(fields: dict[str, Any]) -> str:
    """Return the name of a known event type."""
    found = required(fields, "type")
    if type(found) is not str:
        raise _wrong_type("type", found, "a string")
    if found not in CODES:
        raise Refusal("BAD_TYPE", f"type is none of {', '.join(NAMES)}")
    return found


def event_time(fields: dict[str, Any], name: str, record_ms: int) -> int:
    """Return a time in epoch ms, no more than five minutes ahead of the record's own time and not before 2000.

    `record_ms` is Kafka's timestamp; negative says that the record has none.
    """
    found = required(fields, name)
    if type(found) is int:
        if not INT64_MIN <= found <= INT64_MAX:
            raise Refusal("OUT_OF_RANGE", f"{name} is an integer beyond 64 bits")
        ts_ms = found
    elif type(found) is str:
        ts_ms = _rfc3339_ms(name, found)
    else:
        raise _wrong_type(name, found, "epoch milliseconds or RFC 3339 text")
    if ts_ms < EARLIEST_MS:
        raise Refusal("TS_ANCIENT", f"{name} is before the year 2000 (are these seconds? milliseconds are expected)")
    if ts_ms > (record_ms + MAX_AHEAD_MS if record_ms >= 0 else LATEST_MS):
        raise Refusal("TS_FUTURE", f"{name} is more than 5 minutes ahead of the record's Kafka timestamp")
    return ts_ms


def milliseconds(moment: datetime) -> int:
    """Return whole epoch milliseconds, rounded down."""
    since = moment - EPOCH
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


def optional_number(fields: dict[str, Any], name: str) -> float | None:
    """Return a finite number as a double; null is the same as absent."""
    found = fields.get(name)
    if found is None:
        return None
    if type(found) is int and not INT64_MIN <= found <= INT64_MAX:
        raise Refusal("OUT_OF_RANGE", f"{name} is an integer beyond 64 bits")
    if type(found) not in (int, float):
        raise _wrong_type(name, found, "a number")
    number = float(found)
    if not isfinite(number):
        raise Refusal("NON_FINITE", f"{name} is not finite")
    return number


def optional_object(fields: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a JSON object; null is the same as absent."""
    found = fields.get(name)
    if found is not None and type(found) is not dict:
        raise _wrong_type(name, found, "an object")
    return found


def storable(name: str, content: Any) -> Any:
    """Return `content` if a database can hold its text: no NUL and no lone surrogate, in keys or values."""
    if isinstance(content, str):
        if _NOT_STORABLE.search(content):
            raise Refusal("BAD_ENCODING", f"{name} holds a NUL or a lone surrogate, which no database text can")
    elif isinstance(content, dict):
        for inner_name, inner in content.items():
            storable(name, inner_name)
            storable(name, inner)
    elif isinstance(content, list):
        for inner in content:
            storable(name, inner)
    return content


def text(fields: dict[str, Any], name: str) -> str:
    """Return storable text, possibly empty."""
    found = required(fields, name)
    if type(found) is not str:
        raise _wrong_type(name, found, "a string")
    storable(name, found)
    return found


def flag(fields: dict[str, Any], name: str, default: bool) -> bool:
    """Return a boolean; null is the same as absent."""
    found = fields.get(name)
    if found is None:
        return default
    if type(found) is not bool:
        raise _wrong_type(name, found, "true or false")
    return found


def _rfc3339_ms(name: str, found: str) -> int:
    # Clocks that show a leap second mean the start of the next minute.
    shown, leaps = _LEAP_SECOND.subn(r"\g<1>59", found, count=1)
    try:
        moment = msgspec.convert(shown, AwareDatetime)
    except msgspec.ValidationError:
        raise Refusal("BAD_TYPE", f"{name} is not RFC 3339 text with an offset") from None
    return milliseconds(moment) + 1000 * leaps


def _wrong_type(name: str, found: Any, expected: str) -> Refusal:
    return Refusal("BAD_TYPE", f"{name} is {_KINDS.get(type(found), 'a number')}, it must be {expected}")
