"""Synthetic streams as Kafka messages: with copies and broken messages whose fate is known, or encoded for load."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic import START_MS, Drawn, draw, user_id, zipf


@dataclass(frozen=True)
class Message:
    """One Kafka message and what must become of it: applied, duplicate, or the reason code of its dead letter."""

    key: bytes
    value: bytes
    fate: str


def messages(drawn: Iterable[Drawn], *, duplicates: float, malformed: float, seed: int) -> Iterator[Message]:
    """Events as Kafka messages, followed now and then by a copy of a recent one or by a message that is broken.

    `duplicates` and `malformed` are expected numbers per event.  A copy is byte for byte, and one of the last 100.
    """
    rng = np.random.default_rng([seed, 4])
    recent: deque[Message] = deque(maxlen=100)
    for one in drawn:
        key, value = user_id(one.user).encode(), _encoded(one.event)
        recent.append(Message(key, value, "applied"))
        yield recent[-1]
        if rng.random() < duplicates:
            copied = recent[rng.integers(len(recent))]
            yield Message(copied.key, copied.value, "duplicate")
        if rng.random() < malformed:
            yield _break(one.event, key, int(rng.integers(len(_BREAKS))))


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


# What breaks an event, and the reason code that its dead letter must carry.
_BREAKS: tuple[tuple[str, dict[str, Any] | bytes], ...] = (
    ("BAD_ENCODING", b'{"v":1,"event_id":"\xff\xfe"}'),
    ("BAD_JSON", b'{"v":1,"event_id":'),
    ("NOT_OBJECT", b"[]"),
    ("MISSING_FIELD", b'{"v":1}'),
    ("BAD_TYPE", {"value": "four"}),
    ("UNKNOWN_VERSION", {"v": 99}),
    ("BAD_ID", {"item_id": ""}),
    ("TS_ANCIENT", {"ts": 86_400_000}),
)


def _break(event: dict[str, Any], key: bytes, kind: int) -> Message:
    reason, change = _BREAKS[kind]
    if isinstance(change, bytes):
        return Message(key, change, reason)
    return Message(key, _encoded({**event, "event_id": f"{event['event_id']}-broken", **change}), reason)


def encoded_chunks(
    count: int,
    *,
    users: int,
    item_ids: Sequence[str],
    activity: float | None = 1.0,
    item_shares: NDArray[np.float64] | None = None,
    seed: int = 0,
    chunk: int = 50_000,
) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Clicks without a truth, for load: (keys, values) in chunks, several hundred thousand events a second.

    Users follow Zipf's law with exponent `activity`; None sends each user in turn, so that `count` = `users` makes
    every event another user.  Items are drawn by `item_shares`, else by Zipf's law with exponent 0.7.  Event ids are
    unique over all chunks.
    """
    rng = np.random.default_rng([seed, 5])
    keys = [user_id(user).encode() for user in range(users)]
    items = [json.dumps(name).encode() for name in item_ids]
    user_law = None if activity is None else np.cumsum(zipf(users, activity))
    item_law = np.cumsum(zipf(len(items), 0.7) if item_shares is None else item_shares)
    for start in range(0, count, chunk):
        numbers = range(start, min(start + chunk, count))
        who = [n % users for n in numbers] if user_law is None else draw(user_law, rng, len(numbers)).tolist()
        what = draw(item_law, rng, len(numbers)).tolist()
        chunk_keys = [keys[user] for user in who]
        yield chunk_keys, [_click(*row) for row in zip(numbers, chunk_keys, (items[i] for i in what), strict=True)]


def _click(number: int, key: bytes, item: bytes) -> bytes:
    """One event as bytes; the ids need no escaping here."""
    return b'{"v":1,"event_id":"e-%d","user_id":"%b","item_id":%b,"type":"click","ts":%d}' % (
        number,
        key,
        item,
        START_MS + number,
    )
