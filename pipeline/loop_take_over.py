"""Where a partition goes on that is taken over: at its row in the database, if the broker's log continues that."""

from __future__ import annotations

from pipeline.chunks import Place
from pipeline.store import Store
from schemas.errors import ConfigurationError


class DataGap(ConfigurationError):
    """Events were deleted before they were read: set INNERLOOP_ACCEPT_DATA_GAP=true once to go on without them."""


class TopicRecreated(ConfigurationError):
    """The position lies beyond the topic's end: it was made anew. Migrate into a new database, or restore the topic."""


def resume(store: Store, place: Place, found: int | None, bounds: tuple[int, int], *, accept_gap: bool) -> int:
    """Give the offset at which a partition goes on, noting it in the database where it is new there.

    `found` is its position in the database, None if it was never read; `bounds` are the (beginning, end) offsets that
    the broker has; `accept_gap` lets those be skipped that it no longer has.

    Raises:
        DataGap, TopicRecreated: the broker's log does not continue the position.

    """
    (topic, partition), (beginning, end) = place, bounds
    if found is None:
        store.begin_partition(topic, partition, beginning)
        return beginning
    if found > end:
        raise TopicRecreated(f"{topic}[{partition}] is at {found} in the database, the broker's log ends at {end}")
    if found >= beginning:
        return found
    if not accept_gap:
        raise DataGap(
            f"DATA_GAP {topic}[{partition}] {found}..{beginning}: the broker no longer has these offsets; "
            "set INNERLOOP_ACCEPT_DATA_GAP=true once to go on without them"
        )
    store.accept_gap(topic, partition, start=found, end=beginning)
    return beginning
