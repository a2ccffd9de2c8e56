"""Why an item stands where it stands in a user's list: its score taken back to the events that it came from.

Pure: the adaptation that wrote the list computes it again with one thing left out at a time, so an explanation and a
list cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp

from models.attribution import Attribution, attribute
from models.gate import DIVERGED, GATED, SERVED, UNUSED
from pipeline.adaptation import Adaptation
from pipeline.catalogue import ListedItem
from schemas.event_types import NAMES

USES = {UNUSED: "unused", SERVED: "served", GATED: "gated", DIVERGED: "diverged"}
NEVER_LISTED = {
    "withdrawn": "it is withdrawn from the catalogue",
    "dismissed": "the user dismissed it",
    "had": "the user has had it, and this version does not recommend items again",
}


class Unexplained(Exception):
    """There is nothing to take apart: the sentence says why."""


@dataclass(frozen=True)
class SupportEvent:
    """One event of the support set, and what the item's logit (nats) and rank would be without it."""

    events_ago: int  # 1: the newest
    type: str
    item_id: str
    text: str
    logit: float
    rank_without: int


@dataclass(frozen=True)
class Explanation:
    """An item for a user, as computed now under the version that the user's list was made by.

    Attributes:
        excluded: a key of NEVER_LISTED, or None; score and rank are then those that the item would have.
        logit: nats; `score = sigmoid(logit)`, and logit = offset + the sum of the shares.
        adapter: whether the adapter is served, one of USES' names; adapter_events: residuals that it learnt from.
        shares: by name, what adds to the logit, and the rank without it.
        events: newest first.

    """

    user_id: str
    item_id: str
    text: str
    version: int
    partition: int
    last_offset: int
    num_events: int
    excluded: str | None
    score: float
    rank: int
    logit: float
    offset: float
    adapter: str
    adapter_events: int
    shares: Mapping[str, tuple[float, int]]
    events: list[SupportEvent]


def explain(adaptation: Adaptation, user_id: str, item_id: str, items: Mapping[int, ListedItem]) -> Explanation:
    """Explain an item to a user who has a slot; items by number. Raises Unexplained where it has no place at all."""
    table, catalogue = adaptation.table, adaptation.catalogue
    number = catalogue.number_of.get(item_id)
    if number is None:
        raise Unexplained(f"there is no item {item_id!r}: feed the catalogue with `innerloop items FILE`")
    row = int(catalogue.row_of[number])
    if row < 0:
        raise Unexplained(
            f"item {item_id!r} is known from events alone, and not scored: `innerloop items FILE` lists it"
        )
    tasks, priors = adaptation.task(user_id)
    found = attribute(adaptation.ranker, tasks, priors, row)
    slot = int(table.slots([user_id])[0])
    return Explanation(
        user_id,
        item_id,
        items[number].text,
        adaptation.version,
        int(table.partition[slot]),
        int(table.last_offset[slot]),
        int(table.num_events[slot]),
        _excluded(adaptation, slot, number, row),
        1.0 / (1.0 + exp(-found.logit)),
        found.rank,
        found.logit,
        found.offset,
        USES[int(adaptation.ranker.rank(tasks, priors, 1).use[0])],
        int(table.adapter_events[slot]),
        {name: (share.logit, share.rank_without) for name, share in found.shares.items()},
        _events(adaptation, slot, found, items),
    )


def _excluded(adaptation: Adaptation, slot: int, number: int, row: int) -> str | None:
    marks = adaptation.table.seen(slot)
    if row in adaptation.catalogue.unavailable:
        return "withdrawn"
    if -number in marks:
        return "dismissed"
    return "had" if number in marks and not adaptation.recommend_seen else None


def _events(
    adaptation: Adaptation, slot: int, found: Attribution, items: Mapping[int, ListedItem]
) -> list[SupportEvent]:
    size = adaptation.ranker.parameters.support_size
    numbers = adaptation.table.support_items[slot, -size:].tolist()
    types = adaptation.table.support_types[slot, -size:].tolist()
    events = []
    for place, number in enumerate(numbers):
        if number == 0:
            continue
        share, item = found.events.get(place), items[number]
        # an item that nobody lists says nothing
        lost = (0.0, found.rank) if share is None else (share.logit, share.rank_without)
        events.append(SupportEvent(len(numbers) - place, NAMES[types[place]], item.item_id, item.text, *lost))
    return events[::-1]
