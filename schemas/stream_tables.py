"""Tables that workers write: catalogue, positions, users, and the record of every prediction."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from schemas.columns import (
    BOOLS,
    FLOAT4S,
    FLOAT8S,
    ID_TEXT,
    INT2S,
    INT4S,
    INT8S,
    TEXTS,
    array,
    clock,
    metadata,
    of_partition,
    required,
    stamp,
)

items = Table(
    "items",
    metadata,
    Column("item_id", ID_TEXT, primary_key=True),
    Column("item_no", Integer, Identity(), unique=True, nullable=False),
    Column("text", Text),
    Column("attributes", JSONB),
    required("available", Boolean, text("true")),
    required("known", Boolean, text("true")),
    Column("snapshot", BigInteger),
    stamp("updated_at"),
)

catalogue_snapshots = Table(
    "catalogue_snapshots",
    metadata,
    Column("snapshot", BigInteger, Identity(), primary_key=True),
    stamp("created_at"),
)

FATES = ("applied", "dead_lettered", "duplicates", "dropped", "skipped")  # together, by the law, every offset passed

stream_position = Table(
    "stream_position",
    metadata,
    *of_partition(),
    required("first_offset", BigInteger),
    required("next_offset", BigInteger),
    *(required(name, BigInteger, text("0")) for name in FATES),
    stamp("updated_at"),
    required("rate_limited", BigInteger, text("0")),
)

activations = Table(
    "activations",
    metadata,
    *of_partition(),
    Column("kind", Text, primary_key=True),
    required("value", BigInteger),
    Column("from_offset", BigInteger, primary_key=True, autoincrement=False),
    stamp("activated_at"),
)

item_statistics = Table(
    "item_statistics",
    metadata,
    *of_partition(),
    required("epoch_offset", BigInteger),
    required("item_nos", INT4S),
    required("counts", LargeBinary),
    array("pending_buckets", INT2S),
    array("pending_items", INT4S),
)

pair_snapshots = Table(
    "pair_snapshots",
    metadata,
    *of_partition(),
    required("meta_version", Integer),
    required("epoch_offset", BigInteger),
    required("item_nos", INT4S),
    required("others", LargeBinary),
    required("counts", LargeBinary),
    required("scales", LargeBinary),
    required("users", LargeBinary),
    required("taken", LargeBinary),
)

pair_log = Table(
    "pair_log",
    metadata,
    *of_partition(),
    Column("first_offset", BigInteger, primary_key=True, autoincrement=False),
    required("items", LargeBinary),
    required("before", LargeBinary),
)

user_state = Table(
    "user_state",
    metadata,
    Column("user_id", ID_TEXT, primary_key=True),
    required("partition", Integer),
    required("last_offset", BigInteger),
    required("num_events", Integer),
    required("num_applied", Integer),
    array("support_items", INT4S),
    array("support_types", INT2S),
    array("adapter", FLOAT4S),
    required("adapter_events", Integer, text("0")),
    required("meta_version", Integer),
    array("top_items", INT4S),
    array("top_scores", FLOAT8S),
    array("recent_ids", INT8S),
    array("recent_bodies", INT4S),
    array("recent_seen", INT4S),
    required("num_seen", Integer, text("0")),
    stamp("updated_at"),
    array("track", FLOAT4S),
    required("adapter_use", SmallInteger, text("0")),
    required("due_us", BigInteger, text("0")),
    Index("user_state_not_served", "adapter_use", postgresql_where=text("adapter_use > 1")),
)

event_ids = Table(
    "event_ids",
    metadata,
    Column("user_id", ID_TEXT, primary_key=True),
    Column("segment", Integer, primary_key=True, autoincrement=False),
    required("ids", INT8S),
    required("bodies", INT4S),
)

seen_items = Table(
    "seen_items",
    metadata,
    Column("user_id", ID_TEXT, primary_key=True),
    Column("segment", Integer, primary_key=True, autoincrement=False),
    required("items", INT4S),
)

prequential = Table(
    "prequential",
    metadata,
    *of_partition(),
    Column("first_offset", BigInteger, primary_key=True, autoincrement=False),
    required("next_offset", BigInteger),
    stamp("recorded_at"),
    required("meta_version", Integer),
    required("offsets", INT8S),
    required("record_times", INT8S),
    required("user_ids", TEXTS),
    required("item_nos", INT4S),
    required("types", INT2S),
    required("num_events", INT4S),
    required("loss_adapted", FLOAT4S),
    required("loss_start", FLOAT4S),
    required("rank_adapted", INT4S),
    required("rank_start", INT4S),
    required("rank_popular", INT4S),
    array("event_times", INT8S),
    array("new_items", BOOLS),
    array("scenes", INT2S),
    array("scene_names", TEXTS),
    array("applied_types", INT4S),
    Index("prequential_recorded_at", "recorded_at", postgresql_using="brin"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    *of_partition(),
    Column("offset", BigInteger, primary_key=True, autoincrement=False),
    required("reason", Text),
    required("detail", Text),
    Column("key", LargeBinary),
    Column("payload", LargeBinary),
    required("sha256", Text),
    Column("record_time", BigInteger),
    stamp("first_seen"),
    required("attempts", Integer, text("1")),
    Column("replayed_at", DateTime(timezone=True)),
    Index("dead_letters_reason", "reason", "first_seen"),
)

popular_items = Table(
    "popular_items",
    metadata,
    *of_partition(),
    required("item_nos", INT4S),
    required("scores", FLOAT8S),
    required("meta_version", Integer),
    stamp("updated_at"),
)

erasure_key = Table(
    "erasure_key",
    metadata,
    Column("number", Integer, primary_key=True, server_default=text("1"), autoincrement=False),
    required("key", LargeBinary),
)

erased_users = Table(
    "erased_users",
    metadata,
    Column("user_hash", LargeBinary, primary_key=True),
    Column("erasure", BigInteger, unique=True, nullable=False),
    required("erased_ms", BigInteger),
    clock("erased_at"),
)

worker_settings = Table(
    "worker_settings",
    metadata,
    Column("fingerprint", Integer, primary_key=True, autoincrement=False),
    required("settings", JSONB),
    stamp("first_used_at"),
)
