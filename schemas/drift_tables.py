"""Tables of the drift monitor: what it remembers, finds and decides, and the record's hours."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from schemas.columns import clock, metadata, of_partition, required

drift_positions = Table(
    "drift_positions",
    metadata,
    *of_partition(),
    required("next_offset", BigInteger),
    required("applied", BigInteger),
)

drift_state = Table(
    "drift_state",
    metadata,
    Column("topic", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    required("numbers", JSONB, text("'{}'")),
    required("inputs", LargeBinary, text("''")),
)

drift_monitors = Table(
    "drift_monitors",
    metadata,
    Column("topic", Text, primary_key=True),
    required("holder", Text),
    clock("ready_at"),
    clock("seen_at"),
    Column("meta_version", Integer),
    required("labels", BigInteger, text("0")),
    required("blind", Text, text("''")),
    Column("case_series", Text),
    required("inputs", JSONB, text("'{}'")),
)

drift_alarms = Table(
    "drift_alarms",
    metadata,
    Column("alarm", BigInteger, Identity(), primary_key=True),
    required("topic", Text),
    clock("found_at"),
    required("record_time", BigInteger),
    Column("meta_version", Integer),
    required("series", Text),
    required("label", BigInteger),
    required("mean_before", Double),
    required("mean_after", Double),
    required("worse", Boolean),
    Index("drift_alarms_record_time", "topic", "record_time"),
)

drift_decisions = Table(
    "drift_decisions",
    metadata,
    Column("decision", BigInteger, Identity(), primary_key=True),
    required("topic", Text),
    clock("decided_at"),
    required("record_time", BigInteger),
    Column("meta_version", Integer),
    required("verdict", Text),
    required("reason", Text),
    required("inputs", JSONB),
    required("thresholds", JSONB),
    Index("drift_decisions_topic", "topic", "decision"),
)

drift_freezes = Table(
    "drift_freezes",
    metadata,
    Column("number", BigInteger, Identity(), primary_key=True),
    clock("from_at"),
    Column("until_at", DateTime(timezone=True)),
    required("login", Text, text("session_user")),
    required("reason", Text),
    Index("drift_freezes_one_open", text("(until_at IS NULL)"), unique=True, postgresql_where=text("until_at IS NULL")),
)

prequential_hours = Table(
    "prequential_hours",
    metadata,
    *of_partition(),
    Column("hour", DateTime(timezone=True), primary_key=True),
    Column("meta_version", Integer, primary_key=True, autoincrement=False),
    Column("kind", Text, primary_key=True),
    Column("segment", Text, primary_key=True),
    required("num_labels", BigInteger),
    required("num_unknown", BigInteger),
    *(required(name, Double) for name in ("loss_adapted", "loss_start", "gain_squares", "ndcg_adapted", "ndcg_start")),
)
