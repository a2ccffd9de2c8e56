"""Whether an alarm is worth a meta-training: what the labels since say, and every condition with its threshold.

Pure: evidence and circumstances in, a verdict with its reasons out. `retrain` and `no` close the case that the alarm
opened; `wait` keeps it open, because something that passes stands in the way.

Letters: E labels, U users.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Verdict = Literal["retrain", "wait", "no"]
UNKNOWN_GAIN = "what a refit would gain is not known yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What must hold before a model is trained again; the defaults are those of the settings `drift_…`.

    Attributes:
        least_worse: relative rise of the held-out loss that matters.
        standard_errors: how many of them the rise must exceed as well.
        labels, users: how many the evidence needs.
        user_weight: largest share of one user in the evidence.
        new_labels: labels since the alarm, which are what there is to learn from.
        cool_down_seconds, cool_down_labels: whichever is over first; both double with each rejected challenger.
        per_day: retrainings within 24 hours.
        dead_letters: share of events that could not be applied.
        top_share: of the excess, caused by the `top_users` (a share) whom it concerns most.
        days: whole days that the expectation must have seen before the alarm: until then an evening looks like drift.
        cost: of one retraining, in nats: loss per label saved times labels until it is paid back, one day at most.

    """

    least_worse: float = 0.02
    standard_errors: float = 3.0
    labels: int = 2000
    users: int = 500
    user_weight: float = 0.01
    new_labels: int = 5000
    cool_down_seconds: float = 6 * 3600.0
    cool_down_labels: int = 50_000
    per_day: int = 4
    dead_letters: float = 0.01
    top_users: float = 0.01
    top_share: float = 0.20
    days: int = 1
    cost: float = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the labels since an alarm say. `worse` and `standard_error` are relative to the expected loss.

    `absorbed`: nats per label that the adapters take off the start's loss beyond what they took before.
    """

    labels: int
    users: int
    expected_loss: float
    worse: float
    standard_error: float
    worse_lately: float
    top_share: float
    absorbed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """Everything else that a decision looks at.

    Attributes:
        new_labels: labels since the alarm.
        days: whole days seen before the alarm.
        seconds_since, labels_since: since the newest retraining, None before the first.
        rejected: challengers rejected in a row.
        retrained_today: retrainings within 24 hours.
        busy: what is under way already: a request, a canary; "" for nothing.
        gain: loss per label that a refit of the linear parts saves on labels after it, None before it was tried.
        labels_per_day: how many there will be.
        blind: why the monitor's own input cannot be trusted; "" when it can.
        frozen: why an operator has forbidden retraining; "" when nobody has.

    """

    new_labels: int
    days: int = 0
    seconds_since: float | None = None
    labels_since: int | None = None
    rejected: int = 0
    retrained_today: int = 0
    dead_letters: float = 0.0
    busy: str = ""
    gain: float | None = None
    labels_per_day: float = 0.0
    blind: str = ""
    frozen: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, and one sentence for each condition that stood in the way (or the one that was met)."""

    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def reason(self) -> str:
        """All of it as one text."""
        return "; ".join(self.reasons)


def weigh(loss: Floats, expected: Floats, users: Ints, thresholds: Thresholds) -> Evidence:
    """Compare clipped losses [E] with what was expected of them [E]; `users` [E] are hashes.

    Each user's labels are weighed down to at most `user_weight` of all, and the standard error takes users for
    independent, not labels: excess = Σ w (loss − expected) / Σ w expected, with the sandwich error over users.
    """
    _, user, counts = np.unique(users, return_inverse=True, return_counts=True)
    weights = np.minimum(1.0, thresholds.user_weight * len(loss) / counts)[user]
    excess, total, level = loss - expected, max(weights.sum(), 1e-9), float((weights * expected).sum())
    level = max(level / total, 1e-9)
    mean = float((weights * excess).sum() / total)
    by_user = np.bincount(user, weights * (excess - mean), minlength=len(counts))
    late = slice(len(loss) // 2, None)
    return Evidence(
        labels=len(loss),
        users=len(counts),
        expected_loss=level,
        worse=mean / level,
        standard_error=float(np.sqrt((by_user**2).sum()) / total / level),
        worse_lately=float((weights * excess)[late].sum() / max(weights[late].sum(), 1e-9) / level),
        top_share=top_share(excess, user, thresholds.top_users),
    )


def top_share(excess: Floats, user: Ints, share: float) -> float:
    """How much of the users' mean excess comes from the `share` of them that it concerns most, 0 to 1.

    Whom it concerns most is found on every other label of a user, and what they cause is read on the rest, and the
    other way round: on the same labels the unluckiest would always seem to cause a part. Users count once each;
    0 where nothing is in excess, or hardly anybody has two labels.
    """
    num = int(user.max(initial=-1)) + 1
    order = np.argsort(user, kind="stable")
    place = np.empty(len(user), np.int64)
    firsts = np.searchsorted(user[order], np.arange(num))
    place[order] = np.arange(len(user)) - firsts[user[order]]
    means = []
    for half in (0, 1):
        mine = place % 2 == half
        count = np.bincount(user[mine], minlength=num)
        means.append(
            np.where(count > 0, np.bincount(user[mine], excess[mine], minlength=num) / np.maximum(count, 1), 0)
        )
    both = np.bincount(user, minlength=num) >= 2
    top = max(1, round(share * both.sum()))
    shares = []
    for chosen, read in ((0, 1), (1, 0)):
        of_all = means[read][both].sum()
        worst = np.argsort(-means[chosen][both], kind="stable")[:top]
        shares.append(means[read][both][worst].sum() / of_all if of_all > 0 else 0.0)
    return float(np.clip(np.mean(shares), 0.0, 1.0)) if both.any() else 0.0


def decide(evidence: Evidence | None, now: Circumstances, limits: Thresholds) -> Decision:
    """Apply the conditions. `evidence` is None while there are too few labels to weigh."""
    if now.days < limits.days:
        return Decision("no", (f"{now.days} whole days seen before the alarm: an hour's habit looks the same",))
    waits = _waits(evidence, now, limits)
    if evidence is None or evidence.labels < limits.labels or evidence.users < limits.users:
        return Decision("wait", tuple(waits))
    if now.new_labels >= limits.new_labels:
        refusal = _refusal(evidence, now, limits)
        if refusal:
            return Decision("no", (refusal,))
    if now.gain is None and not waits:
        waits.append(UNKNOWN_GAIN)
    if waits:
        return Decision("wait", tuple(waits))
    gain = now.gain or 0.0
    confirmed = (
        f"the loss is {evidence.worse:+.1%} ± {evidence.standard_error:.1%} "
        f"on {evidence.labels:,} labels of {evidence.users:,} users"
    )
    saves = f"a refit saves {gain:.4f} a label, {gain * now.labels_per_day:,.0f} a day against {limits.cost:,.0f}"
    return Decision("retrain", (confirmed, saves))


def _waits(evidence: Evidence | None, now: Circumstances, limits: Thresholds) -> list[str]:
    """What stands in the way for the time being."""
    found = []
    labels, users = (evidence.labels, evidence.users) if evidence else (0, 0)
    if labels < limits.labels or users < limits.users:
        found.append(f"{labels:,} labels of {users:,} users, {limits.labels:,} of {limits.users:,} are needed")
    if now.new_labels < limits.new_labels:
        found.append(f"{now.new_labels:,} labels since the alarm, {limits.new_labels:,} are needed to learn from")
    if now.frozen:
        found.append(f"frozen: {now.frozen}")
    if now.blind:
        found.append(f"blind: {now.blind}")
    if now.busy:
        found.append(now.busy)
    if cooling := _cool_down(now, limits):
        found.append(cooling)
    if now.retrained_today >= limits.per_day:
        found.append(f"{now.retrained_today} retrainings within a day, {limits.per_day} are allowed")
    if now.dead_letters >= limits.dead_letters:
        found.append(
            f"{now.dead_letters:.1%} of the events are dead letters, below {limits.dead_letters:.1%} is needed"
        )
    return found


def _cool_down(now: Circumstances, limits: Thresholds) -> str:
    if now.seconds_since is None or now.labels_since is None:
        return ""
    times = 2.0**now.rejected
    seconds, labels = limits.cool_down_seconds * times, limits.cool_down_labels * times
    if now.seconds_since >= seconds or now.labels_since >= labels:
        return ""
    after = f" (after {now.rejected} rejected in a row)" if now.rejected else ""
    return (
        f"cooling down{after}: {now.seconds_since / 3600:.1f} h and {now.labels_since:,} labels since the last "
        f"retraining, {seconds / 3600:.1f} h or {labels:,.0f} are needed"
    )


def _refusal(evidence: Evidence, now: Circumstances, limits: Thresholds) -> str:
    """Why no retraining would help, once there is enough to say so."""
    needed = max(limits.least_worse, limits.standard_errors * evidence.standard_error)
    if evidence.worse < needed:
        return f"not confirmed: the loss is {evidence.worse:+.1%}, {needed:+.1%} would be needed"
    if evidence.worse_lately < limits.least_worse:
        return f"absorbed: of {evidence.worse:+.1%} the later labels show {evidence.worse_lately:+.1%}"
    if evidence.top_share >= limits.top_share:
        return (
            f"{limits.top_users:.0%} of the users cause {evidence.top_share:.0%} of the excess loss, "
            f"below {limits.top_share:.0%} is needed"
        )
    if now.gain is not None and now.gain * now.labels_per_day <= limits.cost:
        return (
            f"not worth it: a refit saves {now.gain:.4f} a label, {now.gain * now.labels_per_day:,.0f} a day "
            f"against a cost of {limits.cost:,.0f}"
        )
    return ""


def as_numbers(value: Evidence | Circumstances | Thresholds | None) -> dict[str, Any]:
    """The fields, for a row of `drift_decisions`."""
    return asdict(value) if value is not None else {}
