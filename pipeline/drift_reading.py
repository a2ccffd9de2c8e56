"""Reading what the monitor wrote: whether it watches, what it found, what was decided; and the operators' freeze."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, text

ALIVE_SECONDS = 60  # a monitor says that it is there at least every half minute

_MONITOR = text(
    """
    SELECT m.holder, m.meta_version, m.labels, m.blind, m.case_series, m.inputs, m.seen_at,
        m.seen_at > now() - make_interval(secs => :alive) AS alive,
        (SELECT coalesce(sum(s.applied - d.applied), 0)::bigint FROM innerloop.stream_position s
            JOIN innerloop.drift_positions d USING (topic, partition) WHERE s.topic = m.topic) AS behind,
        (SELECT reason FROM innerloop.drift_freezes WHERE until_at IS NULL) AS frozen
    FROM innerloop.drift_monitors m WHERE m.topic = :topic
    """
)
_DECISIONS = text(
    """
    SELECT decision, decided_at, to_timestamp(record_time / 1000.0) AS record_at, meta_version, verdict, reason, inputs,
        thresholds
    FROM innerloop.drift_decisions WHERE topic = :topic ORDER BY decision DESC LIMIT :most
    """
)
_ALARMS = text(
    """
    SELECT to_timestamp(record_time / 1000.0) AS record_at, series, mean_before, mean_after, worse, label
    FROM innerloop.drift_alarms WHERE topic = :topic ORDER BY alarm DESC LIMIT :most
    """
)
_HOURS = text(
    """
    SELECT hour, sum(num_labels - num_unknown)::bigint AS labels, sum(loss_adapted) AS adapted, sum(loss_start) AS start
    FROM innerloop.prequential_by_hour WHERE topic = :topic AND kind = 'all' AND num_labels > num_unknown
    GROUP BY hour ORDER BY hour DESC LIMIT :most
    """
)
_MINUTES = text(
    """
    SELECT date_trunc('minute', p.recorded_at) AS hour, count(*) AS labels, sum(e.adapted) AS adapted,
        sum(e.start) AS start
    FROM innerloop.prequential p
    CROSS JOIN LATERAL unnest(p.loss_adapted, p.loss_start, p.rank_adapted) AS e (adapted, start, rank)
    WHERE p.topic = :topic AND e.rank > 0 GROUP BY 1 ORDER BY 1 DESC LIMIT :most
    """
)
# When a version's first event came, by the record's own times as everything else: after a backlog that is not now.
_VERSIONS = text(
    """
    SELECT value AS version, coalesce(
        min((SELECT to_timestamp(min(e.at) / 1000.0) FROM innerloop.prequential p,
            unnest(p.offsets, p.record_times) AS e ("offset", at)
            WHERE p.topic = a.topic AND p.partition = a.partition AND p.meta_version = a.value
                AND p.next_offset > a.from_offset AND p.first_offset < a.from_offset + 10000
                AND e."offset" >= a.from_offset)),
        min(activated_at)) AS activated_at
    FROM innerloop.activations a WHERE topic = :topic AND kind = 'meta_version' GROUP BY value
    """
)
_FROZEN = text("SELECT reason FROM innerloop.drift_freezes WHERE until_at IS NULL")
_OPEN = text("INSERT INTO innerloop.drift_freezes (reason) VALUES (:reason)")
_CLOSE = text("UPDATE innerloop.drift_freezes SET until_at = clock_timestamp() WHERE until_at IS NULL RETURNING reason")
_AUDIT = text(
    "INSERT INTO innerloop.audit (actor, action, subject, detail) "
    "VALUES (:actor, :action, 'drift', jsonb_build_object('reason', CAST(:reason AS text)))"
)


@dataclass(frozen=True)
class DriftStatus:
    """What the monitor of a topic says; `behind` counts applied events that it has not read."""

    holder: str | None
    alive: bool
    seen_at: datetime | None
    behind: int
    meta_version: int | None
    labels: int
    blind: str
    case_series: str | None
    frozen: str | None
    inputs: dict[str, Any]
    verdict: str | None
    reason: str | None
    decided_at: datetime | None

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def as_line(self) -> str:
        """Return one line for people."""
        if self.holder is None:
            return "absent"
        seen = "" if self.seen_at is None else f", last seen {self.seen_at:%Y-%m-%d %H:%M:%S} UTC"
        state = "watching" if self.alive else f"gone{seen}"
        blind = f", BLIND: {self.blind}" if self.blind else ""
        case = f", open case: {self.case_series}" if self.case_series else ""
        last = f", last verdict {self.verdict}: {self.reason}" if self.verdict else ""
        return f"{state}, {self.behind:,} events behind{blind}{case}{last}"


def drift_status(connection: Connection, topic: str) -> DriftStatus:
    """Whether the topic is watched, and the newest verdict."""
    row = connection.execute(_MONITOR, {"topic": topic, "alive": ALIVE_SECONDS}).mappings().one_or_none()
    if row is None:
        return DriftStatus(None, False, None, 0, None, 0, "", None, None, {}, None, None, None)
    last = connection.execute(_DECISIONS, {"topic": topic, "most": 1}).mappings().one_or_none()
    names = ("verdict", "reason", "decided_at")
    return DriftStatus(**row, **(dict.fromkeys(names) if last is None else {name: last[name] for name in names}))


@dataclass(frozen=True)
class History:
    """What there is to explain, newest first; `losses` by hour of the events, or by minute where there is one hour."""

    decisions: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    losses: list[dict[str, Any]]
    versions: list[dict[str, Any]]


def history(engine: Engine, topic: str, *, most: int = 500) -> History:
    """Return the newest decisions, alarms and losses, and when versions came into use."""
    wanted = {"topic": topic, "most": most}
    with engine.connect() as connection:
        decisions, alarms, losses = (_rows(connection, query, wanted) for query in (_DECISIONS, _ALARMS, _HOURS))
        if len(losses) < 3:
            losses = _rows(connection, _MINUTES, wanted)
        return History(decisions, alarms, losses, _rows(connection, _VERSIONS, {"topic": topic}))


def frozen(engine: Engine) -> str | None:
    """Why operators have forbidden retraining, None while nobody has."""
    with engine.connect() as connection:
        reason: str | None = connection.scalar(_FROZEN)
    return reason


def freeze(engine: Engine, reason: str, actor: str) -> bool:
    """Forbid retraining until `unfreeze`; False where it is forbidden already."""
    with engine.begin() as connection:
        if connection.execute(_FROZEN).first():
            return False
        connection.execute(_OPEN, {"reason": reason})
        connection.execute(_AUDIT, {"actor": actor, "action": "freeze", "reason": reason})
    return True


def unfreeze(engine: Engine, actor: str) -> bool:
    """Allow retraining again; False where nothing was frozen."""
    with engine.begin() as connection:
        row = connection.execute(_CLOSE).first()
        if row is None:
            return False
        connection.execute(_AUDIT, {"actor": actor, "action": "unfreeze", "reason": row[0]})
    return True


def in_words(decision: dict[str, Any]) -> str:
    """A decision as a paragraph: what was found, what was looked at, what stood in the way."""
    inputs, limits = decision["inputs"], decision["thresholds"]
    evidence, now = inputs.get("evidence") or {}, inputs.get("circumstances") or {}
    verdict = {"retrain": "train again", "wait": "wait", "no": "do not train again"}[decision["verdict"]]
    lines = [
        f"decision {decision['decision']} at {decision['record_at']:%Y-%m-%d %H:%M:%S} UTC, "
        f"version {decision['meta_version']}: {verdict}",
        f"  because   {decision['reason']}",
        f"  alarm     {inputs.get('series')}, {now.get('new_labels', 0):,} labels before",
    ]
    if evidence:
        needed = max(limits["least_worse"], limits["standard_errors"] * evidence["standard_error"])
        lines += [
            f"  loss      {evidence['worse']:+.1%} ± {evidence['standard_error']:.1%} of the expected "
            f"{evidence['expected_loss']:.3f} ({needed:+.1%} needed), lately {evidence['worse_lately']:+.1%}",
            f"  evidence  {evidence['labels']:,} labels of {evidence['users']:,} users "
            f"({limits['labels']:,} of {limits['users']:,} needed); the top {limits['top_users']:.0%} of the users "
            f"cause {evidence['top_share']:.0%} of it (below {limits['top_share']:.0%} needed)",
            f"  adapters  take {evidence['absorbed']:.4f} nats a label off it by themselves",
        ]
    if now.get("gain") is not None:
        worth = now["gain"] * now["labels_per_day"]
        saved = f"saves {now['gain']:.4f} nats a label, {worth:,.0f} a day"
        lines.append(f"  refit     {saved}; it costs {limits['cost']:,.0f}")
    if mix := inputs.get("inputs_of_users"):
        lines.append(f"  users     {mix_in_words(mix)} (reported, no reason)")
    return "\n".join(lines)


def mix_in_words(mix: dict[str, Any]) -> str:
    """What users do, beside what they usually do."""
    (usual_new, new), (usual_rate, rate) = mix["new_items"], mix["labels_per_hour"]
    return (
        f"item mix {mix['item_mix_distance']:.3f} from the usual, new items {usual_new:.1%} → {new:.1%}, "
        f"labels an hour {usual_rate:,.0f} → {rate:,.0f}"
    )


def _rows(connection: Connection, query: Any, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query, wanted).mappings()]
