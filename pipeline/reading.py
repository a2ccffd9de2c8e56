"""Reading what the workers wrote: a user's list, and the state of the stream from SQL and the broker's end offsets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, text

from pipeline import topics
from pipeline.drift_reading import DriftStatus, drift_status

FRESHNESS_WINDOW_SECONDS = 60

_RECOMMEND = text(
    """
    SELECT r.item_id, r.score, r.rank, r.source, i.text
    FROM innerloop.recommend(:user_id, :k) AS r JOIN innerloop.items i ON i.item_id = r.item_id
    ORDER BY r.rank
    """
)
_LAW = text("SELECT * FROM innerloop.law WHERE topic = :topic ORDER BY partition")
_LIVE = text("SELECT version, encoder, live_since, metrics FROM innerloop.meta_versions WHERE status = 'live'")
_DEAD = text(
    "SELECT count(*) FILTER (WHERE replayed_at IS NULL), count(*) FROM innerloop.dead_letters WHERE topic = :topic"
)
_ADAPTERS = text("SELECT users, gated, diverged FROM innerloop.adapters")
# recorded_at is the start of the batch's transaction, record_times are Kafka's.
_FRESHNESS = text(
    """
    SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (
        ORDER BY extract(epoch FROM p.recorded_at) * 1000 - event.record_time), count(*)
    FROM innerloop.prequential p CROSS JOIN LATERAL unnest(p.record_times) AS event (record_time)
    WHERE p.topic = :topic AND p.recorded_at > now() - make_interval(secs => :seconds)
    """
)


@dataclass(frozen=True)
class Recommendation:
    """One line of a user's list; `source` is adapted, start or popular."""

    item_id: str
    score: float
    rank: int
    source: str
    text: str | None


@dataclass(frozen=True)
class PartitionStatus:
    """The law of one partition; `end_offset` and `lag` are None where the broker was not asked or has it not."""

    partition: int
    first_offset: int
    next_offset: int
    applied: int
    dead_lettered: int
    duplicates: int
    dropped: int
    skipped: int
    broken: bool
    updated_at: datetime
    end_offset: int | None
    lag: int | None
    rate_limited: int = 0  # of those dropped


@dataclass(frozen=True)
class Freshness:
    """Milliseconds from Kafka's timestamp to the transaction that held the scores, over the last minute's events."""

    p50_ms: float
    p99_ms: float
    num_events: int


@dataclass(frozen=True)
class Adapters:
    """Users (an estimate where there are many), and whose adapters lost to their starts, or diverged: not served."""

    users: int
    gated: int
    diverged: int


@dataclass(frozen=True)
class Status:
    """The stream as a whole, and whether anybody watches it."""

    topic: str
    partitions: list[PartitionStatus]
    broken: bool
    lag: int | None
    freshness: Freshness | None
    adapters: Adapters
    live_version: int | None
    encoder: str | None
    live_since: datetime | None
    dead_letters: int
    dead_letters_open: int
    broker: str
    watched: DriftStatus

    @property
    def monitor(self) -> str:
        """What the monitor says, in a line; absent until there is one."""
        return self.watched.as_line()

    def as_json(self) -> dict[str, Any]:
        """Return plain values, the monitor's as a line; times as RFC 3339."""
        fields = {name: _plain(value) for name, value in asdict(self).items() if name != "watched"}
        return {**fields, "monitor": self.monitor}


def recommend(engine: Engine, user_id: str, k: int) -> list[Recommendation]:
    """Return the best `k` items (1 to 1000) for a user, known or not."""
    with engine.connect() as connection:
        rows = connection.execute(_RECOMMEND, {"user_id": user_id, "k": k})
        return [Recommendation(*row) for row in rows]


def status(engine: Engine, broker: str | None, topic: str) -> Status:
    """Return the law per partition, lag, freshness and live version; without a broker's answer lag is None."""
    ends, answer = _end_offsets(broker, topic)
    with engine.connect() as connection:
        law = [_partition(row, ends) for row in connection.execute(_LAW, {"topic": topic}).mappings()]
        live = connection.execute(_LIVE).one_or_none()
        adapters = Adapters(*connection.execute(_ADAPTERS).one())
        num_open, num_dead = connection.execute(_DEAD, {"topic": topic}).one()
        fresh = freshness(connection, topic)
        watched = drift_status(connection, topic)
    # Partitions that no worker has taken yet lag by all they hold; the law has no row for them.
    lag = sum(ends.values()) - sum(p.next_offset for p in law if p.partition in ends) if ends else None
    return Status(
        topic=topic,
        partitions=law,
        broken=any(partition.broken for partition in law),
        lag=lag,
        freshness=fresh,
        adapters=adapters,
        live_version=live.version if live else None,
        encoder=live.encoder if live else None,
        live_since=live.live_since if live else None,
        dead_letters=num_dead,
        dead_letters_open=num_open,
        broker=answer,
        watched=watched,
    )


def freshness(connection: Connection, topic: str, seconds: float = FRESHNESS_WINDOW_SECONDS) -> Freshness | None:
    """Return the freshness of the last `seconds`' events, or None when there were none."""
    quantiles, num_events = connection.execute(_FRESHNESS, {"topic": topic, "seconds": seconds}).one()
    return Freshness(quantiles[0], quantiles[1], num_events) if num_events else None


def _end_offsets(broker: str | None, topic: str) -> tuple[dict[int, int], str]:
    if broker is None:
        return {}, "not asked"
    try:
        return topics.end_offsets(broker, topic), "ok"
    except (topics.BrokerUnavailable, topics.TopicMissing) as away:
        # The law is readable without a broker; only the lag is not.
        return {}, str(away)


def _partition(row: Any, ends: dict[int, int]) -> PartitionStatus:
    end = ends.get(row["partition"])
    lag = None if end is None else end - row["next_offset"]
    fields = {name: value for name, value in row.items() if name != "topic"}
    return PartitionStatus(**fields, end_offset=end, lag=lag)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.isoformat() if isinstance(value, datetime) else value
