"""Dead letters: events that could never be applied, listed with their reasons and produced again after a repair."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Engine, RowMapping, select, tuple_, update
from sqlalchemy.sql import func

from pipeline.outbox import Outbox
from schemas.tables import dead_letters

REPLAY_CHUNK = 500
LISTED = ("topic", "partition", "offset", "reason", "detail", "sha256", "first_seen", "attempts", "replayed_at")


@dataclass(frozen=True)
class Selection:
    """Which dead letters are meant; None is any."""

    topic: str | None = None
    reason: str | None = None
    partition: int | None = None
    offset: int | None = None
    since: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the WHERE conditions."""
        table = dead_letters.c
        wanted = {
            table.topic: self.topic,
            table.reason: self.reason,
            table.partition: self.partition,
            table.offset: self.offset,
        }
        since = [table.first_seen >= self.since] if self.since else []
        return [column == value for column, value in wanted.items() if value is not None] + since


@dataclass(frozen=True)
class Replayed:
    """How many dead letters were produced again; `incomplete` ones were larger than the 64 KiB that are kept."""

    replayed: int
    incomplete: int
    failed: int


def listed(engine: Engine, selection: Selection, *, limit: int, include_replayed: bool = False) -> list[dict[str, Any]]:
    """Return the newest dead letters first, without what they carried (a reader may not see it)."""
    columns = [dead_letters.c[name] for name in LISTED]
    query = select(*columns).where(*selection.conditions())
    if not include_replayed:
        query = query.where(dead_letters.c.replayed_at.is_(None))
    query = query.order_by(dead_letters.c.first_seen.desc(), dead_letters.c.offset.desc()).limit(limit)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def counted(engine: Engine, selection: Selection) -> dict[str, int]:
    """Return the number of dead letters not yet replayed, by reason."""
    query = select(dead_letters.c.reason, func.count()).where(*selection.conditions())
    query = query.where(dead_letters.c.replayed_at.is_(None)).group_by(dead_letters.c.reason)
    with engine.connect() as connection:
        return {reason: count for reason, count in connection.execute(query.order_by(dead_letters.c.reason))}


def replay(engine: Engine, broker: str, selection: Selection, *, limit: int | None = None) -> Replayed:
    """Produce the selected dead letters again, to their partition at a new offset, and set `replayed_at`.

    Each is replayed once: a second call finds none. A crash between the broker's confirmation and the COMMIT replays
    one chunk again, and then de-duplication by event_id applies it once. Needs the writer's rights.
    """
    total = Replayed(0, 0, 0)
    outboxes: dict[str, Outbox] = {}
    after: tuple[str, int, int] = ("", -1, -1)
    try:
        while limit is None or total.replayed < limit:
            chunk = REPLAY_CHUNK if limit is None else min(REPLAY_CHUNK, limit - total.replayed)
            done, after = _replay_chunk(engine, selection, chunk, after, lambda topic: _outbox(outboxes, broker, topic))
            if done is None:
                break
            total = Replayed(*(sum(pair) for pair in zip(_counts(total), _counts(done), strict=True)))
    finally:
        for outbox in outboxes.values():
            outbox.close()
    return total


def _replay_chunk(
    engine: Engine,
    selection: Selection,
    size: int,
    after: tuple[str, int, int],
    outbox_of: Callable[[str], Outbox],
) -> tuple[Replayed | None, tuple[str, int, int]]:
    place = tuple_(dead_letters.c.topic, dead_letters.c.partition, dead_letters.c.offset)
    # An empty hash: of a user who was forgotten, nothing is left to be sent.
    waiting = dead_letters.c.replayed_at.is_(None), dead_letters.c.sha256 != ""
    query = select(dead_letters).where(*selection.conditions(), *waiting, place > after)
    with engine.begin() as connection:
        # Locked, so that two operators do not replay the same letter.
        query = query.order_by(place).limit(size).with_for_update(skip_locked=True)
        rows = connection.execute(query).mappings().all()
        if not rows:
            return None, after
        whole = [row for row in rows if _is_whole(row)]
        arrived = _send(whole, outbox_of)
        if arrived:
            connection.execute(update(dead_letters).where(place.in_(arrived)).values(replayed_at=func.now()))
    done = Replayed(len(arrived), len(rows) - len(whole), len(whole) - len(arrived))
    return done, _place(rows[-1])


def _send(rows: list[RowMapping], outbox_of: Callable[[str], Outbox]) -> list[tuple[str, int, int]]:
    failed: set[tuple[str, int, int]] = set()
    for topic in {row["topic"] for row in rows}:
        outbox, own = outbox_of(topic), [row for row in rows if row["topic"] == topic]
        outbox.failures.clear()
        for number, row in enumerate(own):
            outbox.send(number, row["key"], row["payload"], row["partition"])
        outbox.flush()
        failed |= {_place(own[number]) for number in outbox.failures}
    return [_place(row) for row in rows if _place(row) not in failed]


def _outbox(outboxes: dict[str, Outbox], broker: str, topic: str) -> Outbox:
    if topic not in outboxes:
        outboxes[topic] = Outbox(broker, topic)
    return outboxes[topic]


def _is_whole(row: RowMapping) -> bool:
    payload: bytes | None = row["payload"]
    return payload is None or hashlib.sha256(payload).hexdigest() == row["sha256"]


def _place(row: RowMapping) -> tuple[str, int, int]:
    return row["topic"], row["partition"], row["offset"]


def _counts(replayed: Replayed) -> tuple[int, int, int]:
    return replayed.replayed, replayed.incomplete, replayed.failed
