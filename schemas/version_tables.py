"""Tables of meta versions: who asked for them, where they lie, and how states get from one to another."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, REAL

from schemas.columns import INT4S, SCHEMA, clock, metadata, required, stamp

retrain_requests = Table(
    "retrain_requests",
    metadata,
    Column("request", BigInteger, Identity(), primary_key=True),
    stamp("requested_at"),
    required("reason", Text),
    Column("decision", BigInteger, unique=True),
    required("window_from_ms", BigInteger),
    required("window_to_ms", BigInteger),
    required("status", Text, text("'pending'")),
    Column("leased_by", Text),
    Column("leased_until", DateTime(timezone=True)),
    required("attempts", Integer, text("0")),
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
    required("status", Text),
    required("artefact", Text),
    required("sha256", Text),
    required("encoder", Text),
    required("metrics", JSONB, text("'{}'")),
    required("provenance", JSONB, text("'{}'")),
    stamp("created_at"),
    Column("live_since", DateTime(timezone=True)),
    Column("request", BigInteger, ForeignKey(f"{SCHEMA}.retrain_requests.request"), unique=True),
    Column("window_from_ms", BigInteger),
    Column("window_to_ms", BigInteger),
    required("judgement", JSONB, text("'{}'")),
    Column("canary_partitions", INT4S),
    Column("canary_since", DateTime(timezone=True)),
    stamp("changed_at"),
    required("changed_by", Text, text("SESSION_USER")),
    required("reason", Text, text("''")),
    Index("meta_versions_one_live", "status", unique=True, postgresql_where=text("status = 'live'")),
    Index("meta_versions_one_canary", "status", unique=True, postgresql_where=text("status = 'canary'")),
)

artefact_writes = Table(
    "artefact_writes",
    metadata,
    Column("sha256", Text, primary_key=True),
    stamp("begun_at"),
)

state_maps = Table(
    "state_maps",
    metadata,
    *(
        Column(name, Integer, ForeignKey(f"{SCHEMA}.meta_versions.version"), primary_key=True)
        for name in ("source", "target")
    ),
    required("rows", Integer),
    required("cols", Integer),
    required("matrix", LargeBinary),
    required("explained", REAL),
    stamp("created_at"),
)

audit = Table(
    "audit",
    metadata,
    Column("audit", BigInteger, Identity(), primary_key=True),
    clock("at"),
    required("login", Text, text("SESSION_USER")),
    required("actor", Text),
    required("action", Text),
    required("subject", Text),
    required("detail", JSONB, text("'{}'")),
    Index("audit_subject", "subject", "audit"),
)
