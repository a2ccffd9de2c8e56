"""What an explanation is computed from, read in one transaction with a reader's rights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.catalogue import ListedItem
from pipeline.catalogue_store import select_items
from pipeline.item_statistics import ItemStatistics
from pipeline.partition_rows import load_statistics
from pipeline.session import Session
from pipeline.store import LOAD_SEEN_ITEMS, LOAD_USERS
from pipeline.support import UserTable

_LISTED = """SELECT u.updated_at, s.rank, s.score FROM innerloop.user_state u
    LEFT JOIN innerloop.scores s ON s.user_id = u.user_id AND s.item_id = %s WHERE u.user_id = %s"""


@dataclass(frozen=True)
class Listed:
    """Where an item stands in a stored list."""

    rank: int
    score: float


@dataclass(frozen=True)
class UserRows:
    """A user's row with older seen items, its partition's statistics, the catalogue, and what is stored of the item."""

    row: tuple[Any, ...]
    seen: Sequence[Sequence[int]]
    statistics: dict[int, ItemStatistics]
    snapshot: int
    items: list[ListedItem]
    listed: Listed | None
    updated_at: datetime

    @property
    def partition(self) -> int:
        """Where the user lives."""
        return int(self.row[1])

    @property
    def version(self) -> int:
        """The version that the list was made by."""
        return int(self.row[10])

    def fill(self, table: UserTable) -> None:
        """Give the user a slot with this state."""
        slots = table.admit([self.row[0]], [self.partition])
        table.restore(slots, [self.row])
        for items in self.seen:
            table.restore_seen(int(slots[0]), items)


def read_user(session: Session, topic: str, user_id: str, item_id: str) -> UserRows | None:
    """Return all that holds for a user at one moment; None for one without events."""
    with session.transaction() as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        cursor.execute(LOAD_USERS, ([user_id],))
        row = cursor.fetchone()
        if row is None:
            return None
        cursor.execute(LOAD_SEEN_ITEMS, ([user_id],))
        seen = [items for _, items in cursor.fetchall()]
        statistics = load_statistics(cursor, topic, [row[1]], half_life=1.0)  # the version's holds once it is taken up
        snapshot, items = select_items(cursor)
        cursor.execute(_LISTED, (item_id, user_id))
        ((updated_at, *listed),) = cursor.fetchall()
        return UserRows(row, seen, statistics, snapshot, items, Listed(*listed) if listed[0] else None, updated_at)
