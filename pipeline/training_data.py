"""What meta-training learns from: positive events and item texts, from files or topics, by the worker's own rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.catalogue_feed import item_record
from pipeline.chunks import Record
from pipeline.lines import open_source
from pipeline.produce import interaction_record
from pipeline.topics import read_topic
from schemas.errors import ConfigurationError
from schemas.event_types import CODES
from schemas.events import CatalogueItem, Erasure, Interaction, Rejected, parse_erasure, parse_interaction, parse_item
from schemas.mapping import Mapping

Count = Callable[[int], None]

# Users come to a window with the history that they have: events before it, as many times its length.
BEFORE, MOST_BEFORE = 3, 50_000


class NothingToLearn(ConfigurationError):
    """The interactions hold no positive event: check the file, the topic or the types' labels."""


@dataclass
class Window:
    """Positive events in the order they were read, as columns; `rejected` counts the others by reason."""

    users: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Columns:
    """E positive events in event-time order, numbered.

    Attributes:
        users: [E] int64, users numbered by their first event.
        items: [E] int64 rows of `item_ids`.
        times: [E] int64 epoch milliseconds, ascending.
        weights: [E] float32, positive.
        item_ids: the items that occur, ascending by their bytes.
        num_users: how many users there are.

    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.int64]
    weights: NDArray[np.float32]
    item_ids: tuple[str, ...]
    num_users: int


def collect(events: Iterable[Interaction | Rejected], weight_of: NDArray[np.float32], progress: Count) -> Window:
    """Keep the positives; `weight_of` [types] is 0 for a type that is not one. A repeated event_id counts once."""
    window, known = Window(), set[tuple[str, int]]()
    for number, event in enumerate(events, 1):
        if number % 5000 == 0:
            progress(number)
        if isinstance(event, Rejected):
            window.rejected[event.reason] += 1
            continue
        weight = float(weight_of[CODES[event.type]])
        if weight <= 0 or (event.user_id, event.id_hash) in known:
            continue
        known.add((event.user_id, event.id_hash))
        window.users.append(event.user_id)
        window.items.append(event.item_id)
        window.times.append(event.ts_ms)
        window.weights.append(weight)
    return window


def numbered(window: Window) -> Columns:
    """Sort by event time, ties as they were read, and number users and items. Raises NothingToLearn."""
    if not window.users:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in window.rejected.most_common(3))
        mend = "; --mapping FILE.toml says where your fields are found" if "MISSING_FIELD" in window.rejected else ""
        raise NothingToLearn(f"no positive event to learn from{f' (rejected: {reasons})' if reasons else ''}{mend}")
    times = np.array(window.times, np.int64)
    order = np.argsort(times, kind="stable")
    item_ids = tuple(sorted(set(window.items), key=str.encode))
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    number_of: dict[str, int] = {}
    users = [number_of.setdefault(window.users[at], len(number_of)) for at in order.tolist()]
    return Columns(
        users=np.array(users, np.int64),
        items=np.array([row_of[item] for item in window.items], np.int64)[order],
        times=times[order],
        weights=np.array(window.weights, np.float32)[order],
        item_ids=item_ids,
        num_users=len(number_of),
    )


def events_of_file(path: str, mapping: Mapping | None) -> Iterator[Interaction | Rejected]:
    """Read a file as `produce` would send it and a worker would read it."""
    with open_source(path) as source:
        for line in source:
            record = interaction_record(line, mapping=mapping)
            if isinstance(record, Rejected):
                yield record
            else:
                # Checked against its own time: a file of the past has no Kafka timestamp yet.
                yield parse_interaction(record.key, record.value, record.ts_ms or 0)


def events_of_topic(
    broker: str, topic: str, mapping: Mapping | None, *, erased: dict[str, int]
) -> Iterator[Interaction | Rejected]:
    """Read the topic as it is now, from its beginning, by the worker's decoder; `erased` as in `window_of_topic`."""
    for record in read_topic(broker, topic):
        event = parse_interaction(record.key, record.value, record.timestamp, mapping=mapping)
        if not _forgotten(event, record.timestamp, erased):
            yield event


@dataclass(frozen=True)
class Recorded:
    """A decoded record with Kafka's own time."""

    timestamp_ms: int
    event: Interaction | Rejected


def window_of_topic(
    broker: str, topic: str, mapping: Mapping | None, *, since_ms: int, erased: dict[str, int], progress: Count
) -> list[Recorded]:
    """Read the topic from a Kafka time on, by the worker's decoder, in the order of Kafka's times.

    What users did before they asked to be forgotten (`erased`: Kafka time by user) is left out, as workers drop it.
    """
    found = []
    for record in read_topic(broker, topic, since_ms=since_ms, progress=progress):
        event = parse_interaction(record.key, record.value, record.timestamp, mapping=mapping)
        if record.timestamp >= since_ms and not _forgotten(event, record.timestamp, erased):
            found.append(Recorded(record.timestamp, event))
    return sorted(found, key=lambda recorded: recorded.timestamp_ms)


def _forgotten(event: Interaction | Rejected, record_ms: int, erased: dict[str, int]) -> bool:
    """Whether a user did this before asking to be forgotten."""
    return isinstance(event, Interaction) and min(record_ms, event.ts_ms) <= erased.get(event.user_id, -1)


def window_and_history(
    broker: str,
    topic: str,
    mapping: Mapping | None,
    *,
    window_ms: tuple[int, int],
    erased: dict[str, int],
    progress: Count,
) -> list[Recorded]:
    """A window's events and all later ones, and from before it what users whom it knows may bring along."""
    start, end = window_ms
    since_ms = max(0, start - BEFORE * (end - start))
    found = window_of_topic(broker, topic, mapping, since_ms=since_ms, erased=erased, progress=progress)
    first = next((number for number, one in enumerate(found) if one.timestamp_ms >= start), len(found))
    return found[max(0, first - MOST_BEFORE) :]


def erasures_of_topic(broker: str, topic: str) -> dict[str, int]:
    """Return for each user who asked to be forgotten the Kafka time of the last such wish."""
    found: dict[str, int] = {}
    for record in read_topic(broker, topic):
        erasure = parse_erasure(record.key, record.value, record.timestamp)
        if isinstance(erasure, Erasure):
            found[erasure.user_id] = max(record.timestamp, found.get(erasure.user_id, 0))
    return found


def texts_of_file(path: str) -> dict[str, str]:
    """Return the text of each item of a catalogue file; the last line of an item wins."""
    with open_source(path) as source:
        records = (item_record(line) for line in source)
        return _texts((record.key, record.value) for record in records if not isinstance(record, Rejected))


def texts_of_topic(broker: str, topic: str) -> dict[str, str]:
    """Return the text of each item in the topic of items; the last record of an item wins."""
    return _texts(_key_and_value(record) for record in read_topic(broker, topic))


def _texts(records: Iterable[tuple[bytes | None, bytes | None]]) -> dict[str, str]:
    # A withdrawn item keeps its text: people once chose it, so it still teaches what its like is worth.
    found = (parse_item(key, value) for key, value in records)
    return {item.item_id: item.text for item in found if isinstance(item, CatalogueItem)}


def _key_and_value(record: Record) -> tuple[Any, Any]:
    return record.key, record.value
