"""From the bytes of a record to a JSON object, or to a named rejection; total over all bytes, and bounded in time.

Duplicate keys: the last one wins. Limits: 64 KiB a value, 8 levels of nesting, the outermost object being level 1.
"""

from __future__ import annotations

import json
import re
from math import isinf
from typing import Any, NoReturn

import msgspec

MAX_VALUE_BYTES = 64 * 1024
MAX_DEPTH = 8
MAX_DETAIL = 500
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

REASONS: tuple[str, ...] = (
    "BAD_ENCODING",
    "BAD_JSON",
    "NOT_OBJECT",
    "MISSING_FIELD",
    "BAD_TYPE",
    "NON_FINITE",
    "UNKNOWN_VERSION",
    "BAD_ID",
    "OUT_OF_RANGE",
    "TS_FUTURE",
    "TS_ANCIENT",
    "TOO_LARGE",
    "TOO_DEEP",
    "KEY_MISMATCH",
    # Not the decoder's: found where the user's earlier event ids are known.
    "CONFLICTING_DUPLICATE",
    # Nor this: what came of the event is a row that the database does not take.
    "CONSTRAINT",
)

# Never fails to match at a quote, so hostile text costs linear time; an unfinished string ends with the text.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKET = re.compile(rb"[^\[\]{}]+")
_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")
_BEYOND_INT64 = 2**64


class Rejected(msgspec.Struct, frozen=True):
    """Why a record can never be applied: a code of REASONS, and a sentence that quotes nothing of the payload."""

    reason: str
    detail: str


class Refusal(Exception):
    """Carries a Rejected out of nested checks; caught at the decoder's edge, never seen by its callers."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the finished rejection."""
        super().__init__(reason)
        self.rejected = Rejected(reason, escaped(detail))


def escaped(text: str, limit: int = MAX_DETAIL) -> str:
    r"""Return `text` in printable ASCII, at most `limit` characters, so that it cannot move a terminal or forge a line.

    >>> escaped("a\nb\x1b[2J")
    'a\\nb\\x1b[2J'
    """
    # A cut first: each character becomes at least one.
    shown = _NOT_PRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text[:limit])
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def json_object(value: bytes | None) -> dict[str, Any]:
    """Return the JSON object in `value`; its numbers are finite, and beyond int64 only integers that say so.

    Raises Refusal with TOO_LARGE, TOO_DEEP, BAD_ENCODING, BAD_JSON, NON_FINITE or NOT_OBJECT.
    """
    if value is None:
        raise Refusal("BAD_JSON", "the record has no value")
    # Deep before large, on the part within the limit: the sharper of two true reasons.
    if _is_too_deep(value[:MAX_VALUE_BYTES]):
        raise Refusal("TOO_DEEP", f"nested deeper than {MAX_DEPTH} levels")
    if len(value) > MAX_VALUE_BYTES:
        raise Refusal("TOO_LARGE", f"{len(value)} bytes, the limit is {MAX_VALUE_BYTES}")
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal("BAD_ENCODING", f"not UTF-8 at byte {error.start}") from None
    try:
        parsed = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Refusal("BAD_JSON", f"{error.msg} at character {error.pos}") from None
    if not isinstance(parsed, dict):
        raise Refusal("NOT_OBJECT", "the value is JSON, but not an object")
    return parsed


def may_be_too_deep(value: bytes) -> bool:
    """Say whether there are brackets enough, inside or outside of strings, to nest too deep."""
    return value.count(b"{") + value.count(b"[") > MAX_DEPTH


def _is_too_deep(value: bytes) -> bool:
    if not may_be_too_deep(value):
        return False
    depth = 0
    for bracket in _NOT_BRACKET.sub(b"", _STRING.sub(b"", value)):
        depth += 1 if bracket in b"{[" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _finite(digits: str) -> float:
    number = float(digits)
    if isinf(number):
        raise Refusal("NON_FINITE", "a number is beyond the range of a double")
    return number


def _bounded_integer(digits: str) -> int:
    # Any integer beyond int64 is as bad as the next one, and long ones are slow to read.
    return int(digits) if len(digits) <= 20 else (-_BEYOND_INT64 if digits[0] == "-" else _BEYOND_INT64)


def _refuse_constant(name: str) -> NoReturn:
    raise Refusal("NON_FINITE", f"{name} is not a number")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_int=_bounded_integer, parse_constant=_refuse_constant)
