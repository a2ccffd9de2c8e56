"""Feeding interactions: each line becomes one record keyed by its user, checked by the worker's own decoder.

A line that the worker would refuse is reported by its number and counted, and the rest goes on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import msgspec

from pipeline.lines import Line
from schemas.events import Rejected, escaped, parse_interaction
from schemas.mapping import Mapping
from schemas.wire import Refusal, json_object


class Outgoing(NamedTuple):
    """A record to send; `ts_ms` is its event time, None where the line does not say."""

    key: bytes | None
    value: bytes | None
    ts_ms: int | None


Convert = Callable[[Line], Outgoing | Rejected]


class Outlet(Protocol):
    """Where records go; pipeline.outbox.Outbox is the one over Kafka."""

    def send(self, number: int, key: bytes | None, value: bytes | None) -> None:
        """Queue one record; failures are filed under `number`."""


@dataclass
class Tally:
    """What became of the lines so far; `reasons` counts the refused ones by reason code."""

    sent: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def malformed(self) -> int:
        """Lines that were not sent because no worker could apply them."""
        return self.reasons.total()


class Pace:
    """When the next record is due: at most `rate` a second, and event time at most `speed_up` times as fast as it was.

    Waits shorter than 2 ms are saved up: sleeping per event would make the clock's resolution the limit.
    """

    def __init__(
        self,
        rate: float | None = None,
        speed_up: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._speed_up, self._clock, self._sleep = rate, speed_up, clock, sleep
        self._start: float | None = None
        self._first_ms: int | None = None
        self._num_passed = 0

    def wait(self, ts_ms: int | None) -> None:
        """Return when the record with this event time may go."""
        now = self._clock()
        if self._start is None:
            self._start = now
        due = self._start
        if self._rate:
            due = self._start + self._num_passed / self._rate
        if self._speed_up and ts_ms is not None:
            self._first_ms = ts_ms if self._first_ms is None else self._first_ms
            due = max(due, self._start + (ts_ms - self._first_ms) / 1000 / self._speed_up)
        self._num_passed += 1
        if due - now > 0.002:
            self._sleep(due - now)


def produce(
    lines: Iterable[Line],
    outlet: Outlet,
    convert: Convert,
    *,
    pace: Pace,
    complain: Callable[[int, Rejected], None],
    progress: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """Send every line that converts; `complain` gets the line number and the reason of each that does not."""
    tally = Tally()
    for line in lines:
        record = convert(line)
        if isinstance(record, Rejected):
            tally.reasons[record.reason] += 1
            complain(line.number, record)
        else:
            pace.wait(record.ts_ms)
            outlet.send(line.number, record.key, record.value)
            tally.sent += 1
        progress(tally)
    return tally


def interaction_record(line: Line, *, mapping: Mapping | None = None, now_ms: int | None = None) -> Outgoing | Rejected:
    """Convert one line to a record of the contract.

    A missing `v` becomes 1 and a missing `event_id` a hash of the line's content and number, so that feeding the same
    file twice applies it once. A JSON line that has both is sent byte by byte as it is. A mapping translates the
    line into the contract, and finds that hash under the name `line_id`.
    """
    try:
        found, value = _read(line, mapping)
        if mapping is not None:
            found, value = mapping.translate({"line_id": line_id(line), **found}), None
        if "event_id" not in found or "v" not in found:
            found, value = {"v": 1, "event_id": line_id(line), **found}, None
        if value is None:
            value = msgspec.json.encode(found)
    except Refusal as refusal:
        return refusal.rejected
    except UnicodeEncodeError:
        return Rejected("BAD_ENCODING", "the line is not UTF-8")
    key = _key(found.get("user_id"))
    checked = parse_interaction(key, value, int(time.time() * 1000) if now_ms is None else now_ms)
    return checked if isinstance(checked, Rejected) else Outgoing(key, value, checked.ts_ms)


def raw_record(line: Line) -> Outgoing | Rejected:
    """Pass a line through as it is, whatever it is, keyed by its user where one can be read."""
    if not isinstance(line.content, bytes):
        return Rejected("BAD_JSON", "only JSON Lines can be passed through")
    try:
        found = json_object(line.content)
    except Refusal:
        return Outgoing(None, line.content, None)
    return Outgoing(_key(found.get("user_id")), line.content, None)


def line_id(line: Line) -> str:
    """Return an event id for a line that has none: the same for the same content at the same line number."""
    content = line.content if isinstance(line.content, bytes) else msgspec.json.encode(line.content)
    return blake2b(content + b"\n%d" % line.number, digest_size=16).hexdigest()


def _read(line: Line, mapping: Mapping | None) -> tuple[dict[str, Any], bytes | None]:
    """Return the line's object, and its bytes where they may be sent as they are."""
    if line.content is None:
        raise Refusal("BAD_JSON", escaped(line.fault))
    if isinstance(line.content, bytes):
        return json_object(line.content), line.content
    paths = mapping.fields if mapping else {"ts": ("ts",), "value": ("value",)}
    readings = {".".join(paths[name]): read for name, read in _CELLS.items() if name in paths}
    return {name: _cell(cell, readings.get(name)) for name, cell in line.content.items()}, None


# CSV knows only text: epoch times and values are read as numbers, the rest stays as it is.
_CELLS: dict[str, Callable[[str], int | float]] = {"ts": int, "value": float}


def _cell(cell: str, read: Callable[[str], int | float] | None) -> str | int | float:
    try:
        return read(cell) if read else cell
    except ValueError:
        return cell  # RFC 3339 is text; nonsense is the decoder's to name


def _key(user_id: object) -> bytes | None:
    if isinstance(user_id, str):
        return user_id.encode("utf-8", "replace")
    # A boolean is an int to Python; the decoder refuses it, with or without a key.
    return str(user_id).encode() if isinstance(user_id, int) else None
