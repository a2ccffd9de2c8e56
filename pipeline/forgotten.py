"""What a worker must know of users who asked to be forgotten: whom to drop from memory, and whose late events to drop.

The database holds a keyed hash of each, numbered in the order in which they took effect. A batch that was computed
while a user of it was being forgotten must not bring that user back: it is refused in its own transaction, which has
locked the position that the erasure locked before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

READ_KEY = "SELECT key FROM innerloop.erasure_key"
NEWEST = "SELECT coalesce(max(erasure), 0) FROM innerloop.erased_users"
NEWER = "SELECT erasure, user_hash FROM innerloop.erased_users WHERE erasure > %s"
TIMES = "SELECT user_hash, erased_ms FROM innerloop.erased_users WHERE user_hash = ANY(%s)"


class UserErased(Exception):
    """A user of this batch was forgotten while it was computed: forget what is held, and compute it again."""


def user_hash(key: bytes, user_id: str) -> bytes:
    """What stays of a forgotten user: BLAKE2b of the id under the database's own key."""
    return blake2b(user_id.encode(), key=key, digest_size=16).digest()


class Forgotten:
    """The erasures that a worker's memory reflects, up to a number."""

    def __init__(self) -> None:
        self._key = b""
        self._known: int | None = None

    def take_up(self, cursor: Any) -> frozenset[bytes]:
        """Hashes of the users forgotten since the last call; none at the first, when nobody is in memory yet."""
        if self._known is None:
            cursor.execute(READ_KEY)
            self._key = bytes(cursor.fetchone()[0])
            cursor.execute(NEWEST)
            self._known = int(cursor.fetchone()[0])
            return frozenset()
        cursor.execute(NEWER, (self._known,))
        rows = cursor.fetchall()
        self._known = max((number for number, _ in rows), default=self._known)
        return frozenset(bytes(found) for _, found in rows)

    def among(self, user_ids: Iterable[str], hashes: frozenset[bytes]) -> list[str]:
        """Those of the users whose hash is one of these."""
        return [user_id for user_id in user_ids if user_hash(self._key, user_id) in hashes] if hashes else []

    def times(self, cursor: Any, user_ids: Sequence[str]) -> dict[str, int]:
        """For those of the users who asked before, Kafka's time of their last wish, in epoch ms."""
        if not self._known:
            return {}
        by_hash = {user_hash(self._key, user_id): user_id for user_id in user_ids}
        cursor.execute(TIMES, (list(by_hash),))
        return {by_hash[bytes(found)]: at_ms for found, at_ms in cursor.fetchall()}

    def refuse(self, cursor: Any, user_ids: Iterable[str]) -> None:
        """Raise UserErased if one of these was forgotten since `take_up`; positions must be locked already."""
        cursor.execute(NEWER, (self._known or 0,))
        rows = cursor.fetchall()
        if rows and self.among(set(user_ids), frozenset(bytes(found) for _, found in rows)):
            raise UserErased
