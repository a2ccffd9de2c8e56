"""The tables of schema `innerloop` for SQLAlchemy Core; sql/ holds the same in SQL, a test compares the two.

Types: offsets int8, item numbers int4, losses float4, scores float8; times are timestamptz in UTC, except
`record_time(s)`, which are Kafka's own epoch milliseconds.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, REAL

SCHEMA = "innerloop"
metadata = MetaData(schema=SCHEMA)

INT2S, INT4S, INT8S, BOOLS = ARRAY(SmallInteger), ARRAY(Integer), ARRAY(BigInteger), ARRAY(Boolean)
FLOAT4S, FLOAT8S, TEXTS = ARRAY(REAL), ARRAY(Double), ARRAY(Text)
ID_TEXT = Text(collation="C")


def _required(name: str, kind: Any, default: Any = None) -> Column[Any]:
    return Column(name, kind, nullable=False, server_default=default)


def _array(name: str, kind: ARRAY[Any]) -> Column[Any]:
    return _required(name, kind, text("'{}'"))


def _stamp(name: str) -> Column[Any]:
    return _required(name, DateTime(timezone=True), func.now())


def _clock(name: str) -> Column[Any]:
    return _required(name, DateTime(timezone=True), func.clock_timestamp())


def _of_partition() -> tuple[Column[Any], Column[Any]]:
    return Column("topic", Text, primary_key=True), Column("partition", Integer, primary_key=True, autoincrement=False)


items = Table(
    "items",
    metadata,
    Column("item_id", ID_TEXT, primary_key=True),
    Column("item_no", Integer, Identity(), unique=True, nullable=False),
    Column("text", Text),
    Column("attributes", JSONB),
    _required("available", Boolean, text("true")),
    _required("known", Boolean, text("true")),
    Column("snapshot", BigInteger),
    _stamp("updated_at"),
)

catalogue_snapshots = Table(
    "catalogue_snapshots",
    metadata,
    Column("snapshot", BigInteger, Identity(), primary_key=True),
    _stamp("created_at"),
)

stream_position = Table(
    "stream_position",
    metadata,
    *_of_partition(),
    _required("first_offset", BigInteger),
    _required("next_offset", BigInteger),
    *(
        _required(name, BigInteger, text("0"))
        for name in ("applied", "dead_lettered", "duplicates", "dropped", "skipped")
    ),
    _stamp("updated_at"),
)

activations = Table(
    "activations",
    metadata,
    *_of_partition(),
    Column("kind", Text, primary_key=True),
    _required("value", BigInteger),
    Column("from_offset", BigInteger, primary_key=True, autoincrement=False),
    _stamp("activated_at"),
)

item_statistics = Table(
    "item_statistics",
    metadata,
    *_of_partition(),
    _required("epoch_offset", BigInteger),
    _required("item_nos", INT4S),
    _required("counts", LargeBinary),
    _array("pending_buckets", INT2S),
    _array("pending_items", INT4S),
)

pair_snapshots = Table(
    "pair_snapshots",
    metadata,
    *_of_partition(),
    _required("meta_version", Integer),
    _required("epoch_offset", BigInteger),
    _required("item_nos", INT4S),
    _required("others", LargeBinary),
    _required("counts", LargeBinary),
    _required("scales", LargeBinary),
    _required("users", LargeBinary),
)

pair_log = Table(
    "pair_log",
    metadata,
    *_of_partition(),
    Column("first_offset", BigInteger, primary_key=True, autoincrement=False),
    _required("items", LargeBinary),
    _required("before", LargeBinary),
)

user_state = Table(
    "user_state",
    metadata,
    Column("user_id", ID_TEXT, primary_key=True),
    _required("partition", Integer),
    _required("last_offset", BigInteger),
    _required("num_events", Integer),
    _required("num_applied", Integer),
    _array("support_items", INT4S),
    _array("support_types", INT2S),
    _array("adapter", FLOAT4S),
    _required("adapter_events", Integer, text("0")),
    _required("meta_version", Integer),
    _array("top_items", INT4S),
    _array("top_scores", FLOAT8S),
    _array("recent_ids", INT8S),
    _array("recent_bodies", INT4S),
    _array("recent_seen", INT4S),
    _required("num_seen", Integer, text("0")),
    _stamp("updated_at"),
    _array("track", FLOAT4S),
    _required("adapter_use", SmallInteger, text("0")),
    Index("user_state_not_served", "adapter_use", postgresql_where=text("adapter_use > 1")),
)

event_ids = Table(
    "event_ids",
    metadata,
    Column("user_id", ID_TEXT, primary_key=True),
    Column("segment", Integer, primary_key=True, autoincrement=False),
    _required("ids", INT8S),
    _required("bodies", INT4S),
)

seen_items = Table(
    "seen_items",
    metadata,
    Column("user_id", ID_TEXT, primary_key=True),
    Column("segment", Integer, primary_key=True, autoincrement=False),
    _required("items", INT4S),
)

prequential = Table(
    "prequential",
    metadata,
    *_of_partition(),
    Column("first_offset", BigInteger, primary_key=True, autoincrement=False),
    _required("next_offset", BigInteger),
    _stamp("recorded_at"),
    _required("meta_version", Integer),
    _required("offsets", INT8S),
    _required("record_times", INT8S),
    _required("user_ids", TEXTS),
    _required("item_nos", INT4S),
    _required("types", INT2S),
    _required("num_events", INT4S),
    _required("loss_adapted", FLOAT4S),
    _required("loss_start", FLOAT4S),
    _required("rank_adapted", INT4S),
    _required("rank_start", INT4S),
    _required("rank_popular", INT4S),
    _array("event_times", INT8S),
    _array("new_items", BOOLS),
    _array("scenes", INT2S),
    _array("scene_names", TEXTS),
    _array("applied_types", INT4S),
    Index("prequential_recorded_at", "recorded_at", postgresql_using="brin"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    *_of_partition(),
    Column("offset", BigInteger, primary_key=True, autoincrement=False),
    _required("reason", Text),
    _required("detail", Text),
    Column("key", LargeBinary),
    Column("payload", LargeBinary),
    _required("sha256", Text),
    Column("record_time", BigInteger),
    _stamp("first_seen"),
    _required("attempts", Integer, text("1")),
    Column("replayed_at", DateTime(timezone=True)),
    Index("dead_letters_reason", "reason", "first_seen"),
)

retrain_requests = Table(
    "retrain_requests",
    metadata,
    Column("request", BigInteger, Identity(), primary_key=True),
    _stamp("requested_at"),
    _required("reason", Text),
    Column("decision", BigInteger, unique=True),
    _required("window_from_ms", BigInteger),
    _required("window_to_ms", BigInteger),
    _required("status", Text, text("'pending'")),
    Column("leased_by", Text),
    Column("leased_until", DateTime(timezone=True)),
    _required("attempts", Integer, text("0")),
    # use_alter: the two tables refer to each other
    Column("version", Integer, ForeignKey(f"{SCHEMA}.meta_versions.version", use_alter=True)),
    Column("finished_at", DateTime(timezone=True)),
    Column("error", Text),
)

meta_versions = Table(
    "meta_versions",
    metadata,
    Column("version", Integer, Identity(), primary_key=True),
    Column("parent", Integer, ForeignKey(f"{SCHEMA}.meta_versions.version")),
    _required("status", Text),
    _required("artefact", Text),
    _required("sha256", Text),
    _required("encoder", Text),
    _required("metrics", JSONB, text("'{}'")),
    _required("provenance", JSONB, text("'{}'")),
    _stamp("created_at"),
    Column("live_since", DateTime(timezone=True)),
    Column("request", BigInteger, ForeignKey(f"{SCHEMA}.retrain_requests.request"), unique=True),
    Column("window_from_ms", BigInteger),
    Column("window_to_ms", BigInteger),
    _required("judgement", JSONB, text("'{}'")),
    Column("canary_partitions", INT4S),
    Column("canary_since", DateTime(timezone=True)),
    _stamp("changed_at"),
    _required("changed_by", Text, text("SESSION_USER")),
    _required("reason", Text, text("''")),
    Index("meta_versions_one_live", "status", unique=True, postgresql_where=text("status = 'live'")),
    Index("meta_versions_one_canary", "status", unique=True, postgresql_where=text("status = 'canary'")),
)

artefact_writes = Table(
    "artefact_writes",
    metadata,
    Column("sha256", Text, primary_key=True),
    _stamp("begun_at"),
)

state_maps = Table(
    "state_maps",
    metadata,
    *(
        Column(name, Integer, ForeignKey(f"{SCHEMA}.meta_versions.version"), primary_key=True)
        for name in ("source", "target")
    ),
    _required("rows", Integer),
    _required("cols", Integer),
    _required("matrix", LargeBinary),
    _required("explained", REAL),
    _stamp("created_at"),
)

audit = Table(
    "audit",
    metadata,
    Column("audit", BigInteger, Identity(), primary_key=True),
    _clock("at"),
    _required("login", Text, text("SESSION_USER")),
    _required("actor", Text),
    _required("action", Text),
    _required("subject", Text),
    _required("detail", JSONB, text("'{}'")),
    Index("audit_subject", "subject", "audit"),
)

popular_items = Table(
    "popular_items",
    metadata,
    *_of_partition(),
    _required("item_nos", INT4S),
    _required("scores", FLOAT8S),
    _required("meta_version", Integer),
    _stamp("updated_at"),
)

drift_positions = Table(
    "drift_positions",
    metadata,
    *_of_partition(),
    _required("next_offset", BigInteger),
    _required("applied", BigInteger),
)

drift_state = Table(
    "drift_state",
    metadata,
    Column("topic", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    _required("numbers", JSONB, text("'{}'")),
    _required("inputs", LargeBinary, text("''")),
)

drift_monitors = Table(
    "drift_monitors",
    metadata,
    Column("topic", Text, primary_key=True),
    _required("holder", Text),
    _clock("ready_at"),
    _clock("seen_at"),
    Column("meta_version", Integer),
    _required("labels", BigInteger, text("0")),
    _required("blind", Text, text("''")),
    Column("case_series", Text),
    _required("inputs", JSONB, text("'{}'")),
)

drift_alarms = Table(
    "drift_alarms",
    metadata,
    Column("alarm", BigInteger, Identity(), primary_key=True),
    _required("topic", Text),
    _clock("found_at"),
    _required("record_time", BigInteger),
    Column("meta_version", Integer),
    _required("series", Text),
    _required("label", BigInteger),
    _required("mean_before", Double),
    _required("mean_after", Double),
    _required("worse", Boolean),
    Index("drift_alarms_record_time", "topic", "record_time"),
)

drift_decisions = Table(
    "drift_decisions",
    metadata,
    Column("decision", BigInteger, Identity(), primary_key=True),
    _required("topic", Text),
    _clock("decided_at"),
    _required("record_time", BigInteger),
    Column("meta_version", Integer),
    _required("verdict", Text),
    _required("reason", Text),
    _required("inputs", JSONB),
    _required("thresholds", JSONB),
    Index("drift_decisions_topic", "topic", "decision"),
)

drift_freezes = Table(
    "drift_freezes",
    metadata,
    Column("number", BigInteger, Identity(), primary_key=True),
    _clock("from_at"),
    Column("until_at", DateTime(timezone=True)),
    _required("login", Text, text("session_user")),
    _required("reason", Text),
    Index("drift_freezes_one_open", text("(until_at IS NULL)"), unique=True, postgresql_where=text("until_at IS NULL")),
)

prequential_hours = Table(
    "prequential_hours",
    metadata,
    *_of_partition(),
    Column("hour", DateTime(timezone=True), primary_key=True),
    Column("meta_version", Integer, primary_key=True, autoincrement=False),
    Column("kind", Text, primary_key=True),
    Column("segment", Text, primary_key=True),
    _required("num_labels", BigInteger),
    _required("num_unknown", BigInteger),
    *(_required(name, Double) for name in ("loss_adapted", "loss_start", "gain_squares", "ndcg_adapted", "ndcg_start")),
)
