"""The tables of schema `innerloop` for SQLAlchemy Core; sql/ holds the same in SQL, a test compares the two.

Types: offsets int8, item numbers int4, losses float4, scores float8; times are timestamptz in UTC, except
`record_time(s)`, which are Kafka's own epoch milliseconds.
"""

from schemas.columns import SCHEMA, metadata
from schemas.drift_tables import (
    drift_alarms,
    drift_decisions,
    drift_freezes,
    drift_monitors,
    drift_positions,
    drift_state,
    prequential_hours,
)
from schemas.stream_tables import (
    activations,
    catalogue_snapshots,
    dead_letters,
    erased_users,
    erasure_key,
    event_ids,
    item_statistics,
    items,
    pair_log,
    pair_snapshots,
    popular_items,
    prequential,
    seen_items,
    stream_position,
    user_state,
    worker_settings,
)
from schemas.version_tables import (
    artefact_writes,
    audit,
    meta_versions,
    retrain_requests,
    state_maps,
)

__all__ = [
    "SCHEMA",
    "activations",
    "artefact_writes",
    "audit",
    "catalogue_snapshots",
    "dead_letters",
    "drift_alarms",
    "drift_decisions",
    "drift_freezes",
    "drift_monitors",
    "drift_positions",
    "drift_state",
    "erased_users",
    "erasure_key",
    "event_ids",
    "item_statistics",
    "items",
    "meta_versions",
    "metadata",
    "pair_log",
    "pair_snapshots",
    "popular_items",
    "prequential",
    "prequential_hours",
    "retrain_requests",
    "seen_items",
    "state_maps",
    "stream_position",
    "user_state",
    "worker_settings",
]
