"""Wishes to be forgotten, from the topic `erasures` into the database: each once, whoever reads it.

State goes first, in a short transaction that holds the position of the user's partition; the record and the dead
letters are searched afterwards, with nothing locked that workers wait for. The topic's position moves last, so that a
crash in between does the rest again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import topics
from pipeline.batching import Walk, walk
from pipeline.broker import hosts
from pipeline.chunks import Chunk, Record
from pipeline.failpoints import reach
from pipeline.forgotten import READ_KEY, user_hash
from pipeline.outbox import Outbox
from pipeline.partition_rows import INSERT_POSITION, READ_POSITIONS, move_positions, write_dead_letters
from pipeline.session import Fenced, Session
from schemas.errors import ConfigurationError
from schemas.events import Erasure, parse_erasure

TOGETHER = 500  # wishes whose traces are searched for at once

FORGET = "SELECT innerloop.forget_user(%s, %s, %s, %s)"
ERASE = "SELECT innerloop.erase_prequential(%(ids)s::text[]), innerloop.erase_dead_letters(%(ids)s::text[])"


class WishesLost(ConfigurationError):
    """The broker's log of wishes does not go on where the database left it: restore the topic."""


@dataclass
class Erased:
    """What was taken away: states by user, predictions of the record, contents of dead letters."""

    users: int = 0
    predictions: int = 0
    dead_letters: int = 0


def ask(broker: str, topic: str, user_id: str) -> None:
    """Send one user's wish. Raises TopicMissing, BrokerUnavailable."""
    body = {"v": 1, "user_id": user_id, "requested_at": int(time.time() * 1000)}
    with Outbox(broker, topic) as outbox:
        outbox.send(0, user_id.encode(), json.dumps(body, ensure_ascii=False).encode())
    if outbox.failures:
        raise topics.BrokerUnavailable(f"the wish was not taken by {hosts(broker)}: {outbox.failures[0]}; try again")


class Erasures:
    """Reads the topic of wishes on from where anybody left it."""

    def __init__(self, session: Session, broker: str, *, topic: str, interactions: str) -> None:
        self._session, self._broker = session, broker
        self._topic, self._interactions = topic, interactions

    def catch_up(self) -> Erased:
        """Grant every wish that the topic holds now.

        Raises:
            BrokerUnavailable, StoreUnavailable: try again.
            WishesLost: the broker's log does not continue the position.

        """
        erased = Erased()
        ends = topics.end_offsets(self._broker, self._topic)
        positions = self._positions(ends)
        if any(positions[partition] < end for partition, end in ends.items()):
            for chunk in self._chunks(positions):
                self._grant(chunk, positions, erased)
        return erased

    def _positions(self, ends: dict[int, int]) -> dict[int, int]:
        with self._session.transaction() as cursor:
            cursor.execute(READ_POSITIONS, (self._topic, list(ends)))
            found: dict[int, int] = dict(cursor.fetchall())
        if found.keys() == ends.keys() and all(found[partition] == ends[partition] for partition in ends):
            return found
        beginnings = topics.beginning_offsets(self._broker, self._topic)
        with self._session.transaction() as cursor:
            for partition in ends.keys() - found.keys():
                found[partition] = beginnings[partition]
                cursor.execute(INSERT_POSITION, (self._topic, partition, found[partition], found[partition]))
        for partition, position in found.items():
            _check(f"{self._topic}[{partition}]", position, beginnings[partition], ends[partition])
        return found

    def _chunks(self, positions: dict[int, int]) -> Iterator[Chunk]:
        waiting: dict[int, list[Record]] = {}
        for row in topics.read_topic(self._broker, self._topic, starts=positions):
            rows = waiting.setdefault(row.partition, [])
            rows.append(row)
            if len(rows) == TOGETHER:
                yield self._chunk(waiting.pop(row.partition), positions)
        for rows in waiting.values():
            yield self._chunk(rows, positions)

    def _chunk(self, rows: list[Record], positions: dict[int, int]) -> Chunk:
        partition = rows[0].partition
        return Chunk(self._topic, partition, positions[partition], rows[-1].offset + 1, rows)

    def _grant(self, chunk: Chunk, positions: dict[int, int], erased: Erased) -> None:
        found: Walk[Erasure] = walk([chunk], positions, parse_erasure)
        for move in found.advances:
            move.applied = len(found.events)
            positions[move.partition] = move.next_offset
        for wish, row in zip(found.events, found.records, strict=True):
            erased.users += self._forget(wish.user_id, row.timestamp)
        reach("mid_erase")
        try:
            with self._session.transaction() as cursor:
                cursor.execute(ERASE, {"ids": [wish.user_id for wish in found.events]})
                predictions, letters = cursor.fetchone() or (0, 0)
                write_dead_letters(cursor, found.dead_letters)
                move_positions(cursor, found.advances)
        except Fenced:
            return  # somebody else has granted them meanwhile
        erased.predictions += predictions
        erased.dead_letters += letters

    def _forget(self, user_id: str, at_ms: int) -> bool:
        with self._session.transaction() as cursor:
            cursor.execute(READ_KEY)
            ((key,),) = cursor.fetchall()
            cursor.execute(FORGET, (user_id, user_hash(bytes(key), user_id), at_ms, self._interactions))
            ((had_state,),) = cursor.fetchall()
            return bool(had_state)


def _check(place: str, position: int, beginning: int, end: int) -> None:
    if not beginning <= position <= end:
        raise WishesLost(
            f"{place} is at {position} in the database, the broker's log holds {beginning}..{end}: wishes to be "
            "forgotten are missing; restore the topic, or migrate into a new database"
        )
