"""The catalogue in Postgres: numbered snapshots of items, written from the `items` topic by whoever reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg2.extensions
from psycopg2.extras import execute_values

from pipeline.batching import Advance, DeadLetter
from pipeline.catalogue import ListedItem
from pipeline.partition_rows import move_positions, write_dead_letters
from pipeline.session import Session
from pipeline.store import Store
from schemas.events import CatalogueItem, Withdrawal

# Snapshots are numbered in the order in which they commit: a reader that has seen one has seen all before it.
LOCK_SNAPSHOTS = "LOCK TABLE innerloop.catalogue_snapshots IN SHARE ROW EXCLUSIVE MODE"
NEW_SNAPSHOT = "INSERT INTO innerloop.catalogue_snapshots DEFAULT VALUES RETURNING snapshot"
SAVE_ITEMS = """UPDATE innerloop.items AS i SET text = new.text, attributes = new.attributes::jsonb,
    available = new.available, known = true, snapshot = new.snapshot, updated_at = clock_timestamp()
    FROM (VALUES %s) AS new (item_id, text, attributes, available, snapshot) WHERE i.item_id = new.item_id
    AND (i.text, i.attributes, i.available, i.known)
        IS DISTINCT FROM (new.text, new.attributes::jsonb, new.available, true)"""
WITHDRAW_ITEMS = """UPDATE innerloop.items SET available = false, snapshot = %s, updated_at = clock_timestamp()
    WHERE item_id = ANY(%s) AND available"""
NEWEST_SNAPSHOT = "SELECT coalesce(max(snapshot), 0) FROM innerloop.catalogue_snapshots"
ALL_ITEMS = "SELECT item_id, item_no, coalesce(text, ''), available, known FROM innerloop.items"
# Only absent items are put forward: a row that conflicts has used up a number, and workers hold arrays by number.
NUMBER_ITEMS = """INSERT INTO innerloop.items (item_id, known, available)
    SELECT new.item_id, false, false FROM unnest(%s::text[]) AS new (item_id)
    WHERE NOT EXISTS (SELECT FROM innerloop.items AS i WHERE i.item_id = new.item_id)
    ON CONFLICT (item_id) DO NOTHING"""
ITEM_NUMBERS = "SELECT item_id, item_no FROM innerloop.items WHERE item_id = ANY(%s)"


def read_items(store: Store | Session) -> tuple[int, list[ListedItem]]:
    """The newest snapshot's number and every item."""
    with store.transaction() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return select_items(cursor)


def select_items(cursor: psycopg2.extensions.cursor) -> tuple[int, list[ListedItem]]:
    """The same, in a transaction that sees one moment (REPEATABLE READ)."""
    cursor.execute(NEWEST_SNAPSHOT)
    (snapshot,) = cursor.fetchone() or (0,)
    cursor.execute(ALL_ITEMS)
    return snapshot, [ListedItem(*row) for row in cursor.fetchall()]


def number_items(store: Store, item_ids: Sequence[str]) -> dict[str, int]:
    """Numbers for items that only interactions have named; a number says nothing, so it may outlive a rollback."""
    with store.transaction() as cursor:
        cursor.execute(NUMBER_ITEMS, (sorted(item_ids),))
        cursor.execute(ITEM_NUMBERS, (list(item_ids),))
        return dict(cursor.fetchall())


def write_items(
    store: Store,
    changes: Iterable[CatalogueItem | Withdrawal],
    advances: Sequence[Advance],
    dead_letters: Sequence[DeadLetter],
) -> None:
    """Apply a micro-batch of the `items` topic, the last change of an item winning; a snapshot only if one changed."""
    last = {change.item_id: change for change in changes}
    with store.transaction() as cursor:
        move_positions(cursor, advances)
        write_dead_letters(cursor, dead_letters)
        if not last:
            return
        cursor.execute(LOCK_SNAPSHOTS)
        cursor.execute("SAVEPOINT unchanged")
        cursor.execute(NEW_SNAPSHOT)
        (snapshot,) = cursor.fetchone() or (0,)
        rows = [_row(change, snapshot) for _, change in sorted(last.items()) if isinstance(change, CatalogueItem)]
        if rows:
            cursor.execute(NUMBER_ITEMS, ([item_id for item_id, *_ in rows],))
            execute_values(cursor, SAVE_ITEMS, rows, page_size=len(rows))
        num_changed = max(cursor.rowcount, 0) if rows else 0
        withdrawn = [item_id for item_id, change in last.items() if isinstance(change, Withdrawal)]
        cursor.execute(WITHDRAW_ITEMS, (snapshot, withdrawn))
        if num_changed + cursor.rowcount == 0:
            cursor.execute("ROLLBACK TO SAVEPOINT unchanged")


def _row(item: CatalogueItem, snapshot: int) -> tuple[Any, ...]:
    attributes = None if item.attributes is None else json.dumps(item.attributes)
    return item.item_id, item.text, attributes, item.available, snapshot
