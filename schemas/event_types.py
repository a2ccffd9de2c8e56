"""The types of events: the name in the contract, the code in the database, and what the model takes them for."""

from __future__ import annotations

from typing import NamedTuple


class EventType(NamedTuple):
    """One type: label 1 says "wanted", 0 "not wanted", None only "was shown"; weight says how strongly (> 0)."""

    name: str
    label: int | None
    weight: float


# The place in this tuple is the code that is stored: append, never reorder. innerloop.event_type_name says the same.
DEFAULT_EVENT_TYPES: tuple[EventType, ...] = (
    EventType("impression", None, 0.0),
    EventType("view", 1, 0.3),
    EventType("click", 1, 1.0),
    EventType("cart", 1, 2.0),
    EventType("purchase", 1, 4.0),
    EventType("dismiss", 0, 1.0),
    EventType("rating", 1, 1.0),
)

CODES: dict[str, int] = {event_type.name: code for code, event_type in enumerate(DEFAULT_EVENT_TYPES)}
NAMES: tuple[str, ...] = tuple(CODES)
