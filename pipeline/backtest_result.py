"""What a stream backtest found, as figures: headline, gains over K, segments, calibration, lists, cost, peers.

Letters: E judged events, U users.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.figures import Interval
from pipeline import backtest_figures as figures
from pipeline.backtest_figures import Floats, Judged, Row
from pipeline.backtest_model import Streamed
from pipeline.backtest_peers import TITLES
from pipeline.interaction_log import InteractionLog
from pipeline.protocols import StreamCut
from pipeline.support import Ints

PRIMARY = "set_ndcg"
SHOWN_SEGMENT_USERS = 20  # fewer users decide nothing
BOTH = ("adapted", "start")


@dataclass(frozen=True)
class Cost:
    """CPU seconds of the fit, CPU seconds per event (predict, judge, learn), bytes kept per user where known."""

    fit_seconds: float
    event_seconds: float
    user_bytes: int | None


@dataclass(frozen=True)
class Contest:
    """One recommender: what it said, the settings that were chosen for it, what it cost."""

    judged: Judged
    settings: dict[str, Any]
    cost: Cost | None


@dataclass(frozen=True)
class StreamResult:
    """Everything that a report is written from."""

    log: InteractionLog
    cut: StreamCut
    asked: NDArray[np.bool_]
    contests: dict[str, Contest]
    streamed: Streamed
    embeddings: NDArray[np.float32]
    training: dict[str, Any]
    about: dict[str, Any]
    notes: list[str]

    @cached_property
    def users(self) -> Ints:
        """[E] user of each judged event."""
        users: Ints = self.log.users[self.cut.judged][self.asked]
        return users

    @cached_property
    def num_events(self) -> Ints:
        """[E] K."""
        return self.cut.num_events[self.asked]

    @cached_property
    def unseen(self) -> NDArray[np.bool_]:
        """[E]; without unseen users everybody counts, and the notes say so."""
        mask = self.cut.unseen[self.asked]
        return mask if mask.any() else np.ones(len(mask), bool)

    @cached_property
    def metrics(self) -> dict[str, Floats]:
        """[E, M] of every recommender."""
        return {name: contest.judged.metrics() for name, contest in self.contests.items()}

    def overall(self, name: str) -> Row:
        """Figures over all events of unseen users."""
        return figures.row("all", self.metrics[name][self.unseen], self.users[self.unseen])

    def by_k(self, name: str) -> list[Row]:
        """Figures of unseen users by bucket of K."""
        mask = self.unseen
        return figures.by_bucket(self.metrics[name][mask], self.users[mask], self.num_events[mask])

    def ahead(self, peer: str) -> Row:
        """Paired: adapted minus a peer, over all events of unseen users."""
        difference = self.metrics["adapted"] - self.metrics[peer]
        return figures.row("all", difference[self.unseen], self.users[self.unseen])

    def ahead_by_k(self, peer: str) -> list[Row]:
        """Paired: adapted minus a peer, by bucket of K."""
        mask, difference = self.unseen, self.metrics["adapted"] - self.metrics[peer]
        return figures.by_bucket(difference[mask], self.users[mask], self.num_events[mask])

    @property
    def peers(self) -> list[str]:
        """Names of the others, best first."""
        others = [name for name in self.contests if name not in BOTH]
        return sorted(others, key=lambda name: -self.overall(name).metrics[PRIMARY].mean)

    @cached_property
    def adapts(self) -> bool:
        """Whether adaptation changed anything: where validation has switched it off, lists are the start's."""
        return bool((self.metrics["adapted"] != self.metrics["start"]).any())

    @property
    def reference(self) -> str:
        """What gains are drawn over: innerloop's own start, or where that is what is served, the best peer."""
        return "start" if self.adapts or not self.peers else self.peers[0]

    def segments(self) -> list[tuple[str, Row, Row]]:
        """Adapted minus start, and adapted minus the best peer, where whole kinds of events are taken together."""
        found = []
        for label, mask in self._masks():
            if len(np.unique(self.users[mask])) >= SHOWN_SEGMENT_USERS:
                rows = [
                    figures.row(label, (self.metrics["adapted"] - self.metrics[other])[mask], self.users[mask])
                    for other in ("start", *self.peers[:1])
                ]
                found.append((label, rows[0], rows[-1]))
        return found

    def _masks(self) -> list[tuple[str, NDArray[np.bool_]]]:
        items = self.log.items[self.cut.judged][self.asked]
        fitted = self.fitted_events
        rank = np.empty(len(fitted))
        rank[np.argsort(-fitted, kind="stable")] = np.arange(len(fitted)) / len(fitted)
        seen = self.cut.unseen[self.asked]
        lengths = np.bincount(self.users, minlength=len(self.log.user_ids))[self.users]
        codes = self.log.types[self.cut.judged][self.asked]
        masks = [
            ("users unseen in the fit", seen),
            ("users known from the fit", ~seen),
            ("the most popular tenth of the items", self.unseen & (rank[items] < 0.1)),
            ("items of the next four tenths", self.unseen & (rank[items] >= 0.1) & (rank[items] < 0.5)),
            ("the less popular half of the items", self.unseen & (rank[items] >= 0.5) & (fitted[items] > 0)),
            ("items that the fit did not know", self.unseen & (fitted[items] == 0)),
            ("users with at most 20 events", self.unseen & (lengths <= 20)),
            ("users with 21 to 100 events", self.unseen & (lengths > 20) & (lengths <= 100)),
            ("users with more than 100 events", self.unseen & (lengths > 100)),
        ]
        kinds = np.unique(codes)
        from schemas.event_types import NAMES

        masks += [(f"events of type {NAMES[code]}", self.unseen & (codes == code)) for code in kinds if len(kinds) > 1]
        return masks

    @cached_property
    def fitted_events(self) -> Floats:
        """[N] positives of each item before the cut."""
        fit = self.cut.fit[self.log.positive[self.cut.fit]]
        counts: Floats = np.bincount(self.log.items[fit], minlength=len(self.log.item_ids)).astype(float)
        return counts

    def lists(self, name: str) -> dict[str, float]:
        """How a recommender's lists look: what they cover, how unequal, how surprising, how varied."""
        lists, num_items = self.contests[name].judged.lists, len(self.log.item_ids)
        found = {
            "coverage": figures.coverage(lists, num_items),
            "gini": figures.gini(lists, num_items),
            "novelty_bits": figures.novelty(lists, self.fitted_events),
        }
        if self.embeddings.any():
            sample = lists[:: max(1, len(lists) // 2000)]
            found["diversity"] = figures.diversity(sample, self.embeddings)
        return found

    def calibration(self) -> list[tuple[float, float, int]]:
        """Scores of listed items against how often they were among the ten that followed, where ten did follow."""
        lists, scores = self.contests["adapted"].judged.lists, self.streamed.scores
        wanted = self.cut.next_items[self.asked]
        whole = (wanted >= 0).all(1) & self.unseen
        hits = (lists[whole][:, :, None] == wanted[whole][:, None]).any(2)
        listed = lists[whole] >= 0
        return figures.reliability(scores[whole][listed], hits[listed])

    def headline(self) -> list[str]:
        """What there is to know, in words: what adaptation earned, where it did not, who is better."""
        gain, whole = self.ahead("start").metrics[PRIMARY], self.overall("adapted").metrics[PRIMARY]
        users = self.overall("adapted").num_users
        earned = f"adaptation {_earned(gain)} over its own start" if self.adapts else "users are not adapted to"
        said = [
            f"Over {users:,} users whom training never saw, innerloop reaches nDCG@10 {whole.mean:.4f} "
            f"[{whole.low:.4f}, {whole.high:.4f}]; {earned}."
        ]
        if self.adapts:
            said.append(_where(self.ahead_by_k("start")))
        if self.peers:
            ahead = self.ahead(self.peers[0]).metrics[PRIMARY]
            said.append(f"Adapted, it is {figures.compared(ahead, f'the best peer, {TITLES[self.peers[0]]}')}.")
            beaten = [name for name in self.peers if self.ahead(name).metrics[PRIMARY].low > 0]
            said.append(f"It is ahead of {len(beaten)} of {len(self.peers)} peers with the 95 % interval above zero.")
        if "inner_step" in self.training and not str(self.training["inner_step"]).startswith("on"):
            said.append(f"Meta-training switched the inner step {self.training['inner_step']}.")
        return said

    def as_json(self) -> dict[str, Any]:
        """Plain values of everything that the report shows."""
        names = ["adapted", "start", *self.peers]
        return {
            **self.about,
            "users": len(self.log.user_ids),
            "items": len(self.log.item_ids),
            "events": len(self.log),
            "fitted_events": len(self.cut.fit),
            "judged_events": int(self.asked.sum()),
            "headline": self.headline(),
            "notes": self.notes,
            "overall": {name: shown(self.overall(name)) for name in names},
            "by_k": {name: [shown(row) for row in self.by_k(name)] for name in names},
            "adapted_minus": {name: shown(self.ahead(name)) for name in names[1:]},
            "adapted_minus_by_k": {name: [shown(row) for row in self.ahead_by_k(name)] for name in names[1:]},
            "segments": [
                {"segment": label, "over_start": shown(own), "over_best_peer": shown(best)}
                for label, own, best in self.segments()
            ],
            "loss": dict(zip(BOTH, self.streamed.losses[self.unseen].mean(0).tolist(), strict=True)),
            "calibration": self.calibration(),
            "lists": {name: self.lists(name) for name in names},
            "cost": {name: one.cost.__dict__ for name, one in self.contests.items() if one.cost},
            "settings": {name: one.settings for name, one in self.contests.items() if one.settings},
            "training": self.training,
        }


def shown(row: Row) -> dict[str, Any]:
    """A row as plain values, rounded to six places."""
    metrics = {name: [round(value, 6) for value in interval] for name, interval in row.metrics.items()}
    return {"label": row.label, "users": row.num_users, **metrics}


def _earned(gain: Interval) -> str:
    verb = "earned" if gain.low > 0 else "cost" if gain.high < 0 else "earned nothing that can be told from chance:"
    return f"{verb} {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"


def _where(rows: list[Row]) -> str:
    clear = [row.label for row in rows if row.metrics[PRIMARY].low > 0]
    harmed = [row.label for row in rows if row.metrics[PRIMARY].high < 0]
    rest = [row.label for row in rows if row.label not in clear + harmed]
    said = []
    if clear:
        said.append(f"It pays at K = {', '.join(clear)} earlier events")
    if harmed:
        said.append(f"it harms at K = {', '.join(harmed)}")
    if rest:
        said.append(f"no difference can be told at K = {', '.join(rest)}")
    whole = "; ".join(said)
    return whole[:1].upper() + whole[1:] + "."
