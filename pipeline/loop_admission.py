"""Before a batch is computed: every user of it is in memory, every item has a number."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.adaptation import Adaptation
from pipeline.batching import MicroBatch
from pipeline.catalogue_store import number_items
from pipeline.store import Store


def admit(store: Store, batch: MicroBatch, adaptation: Adaptation) -> None:
    """Give every user of the batch a slot and every item a number.

    The batch before may be on its way into the database: its users are in memory, and are not among those read.
    """
    table = adaptation.table
    partitions = dict(
        zip((event.user_id for event in reversed(batch.events)), batch.partition[::-1].tolist(), strict=True)
    )
    missing = table.missing(partitions)
    absent = set(missing)
    table.slots([user_id for user_id in partitions if user_id not in absent])  # touched: not to be evicted now
    if missing:
        store.load_users(table, missing, partitions)
    number(store, adaptation, {event.item_id for event in batch.events})


def number(store: Store, adaptation: Adaptation, item_ids: Iterable[str]) -> None:
    """Give these items numbers, where they have none."""
    known = adaptation.catalogue.number_of
    unknown = {item_id for item_id in item_ids if item_id not in known}
    if unknown:
        adaptation.catalogue.number(number_items(store, sorted(unknown)))
