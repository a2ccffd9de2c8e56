"""Static episodes: support = a user's first K events, all items ranked, nothing learnt from other users meanwhile.

Letters: C cases (users), N items, K shots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.figures import Interval
from models.peers.mixed import scores_in_blocks
from models.peers.peer import Known, Peer
from models.ranker import TaskBatch
from pipeline import backtest_peers
from pipeline.adaptation import Types
from pipeline.backtest_figures import Floats, bootstrap, compared
from pipeline.backtest_model import Model, for_later_events, interactions_of
from pipeline.backtest_peers import TITLES
from pipeline.interaction_log import InteractionLog
from pipeline.offline_worker import OfflineWorker, Recorder
from pipeline.protocols import NUM_HEAD, SHOTS, Query, StaticCut
from pipeline.support import Ints

METRICS = ("ndcg", "recall")
TOP = 10
DRAWS, SEED = 4000, 1
ROUND_USERS = 128  # no more than an epoch of popularity
OWN = ("adapted", "start", "stream")
Scores = dict[int, NDArray[np.float32]]
Tell = Callable[[str, int, int], None]


class ScoreTaker(Recorder):
    """A recorder that keeps all logits instead of ranks."""

    taken: list[tuple[Tensor, Tensor]]

    def note(self, tasks: TaskBatch, priors: Tensor, query: Tensor) -> None:
        """Keep the logits [n, N] before n events."""
        self.taken.append(self.logits(tasks, priors))


@dataclass(frozen=True)
class StaticResult:
    """Scores [C, N] of every recommender after K events, and what they are worth."""

    log: InteractionLog
    cut: StaticCut
    query: Query
    scores: dict[str, Scores]
    settings: dict[str, dict[str, Any]]
    training: dict[str, Any]
    about: dict[str, Any]
    notes: list[str]

    @cached_property
    def metrics(self) -> dict[str, Floats]:
        """nDCG@10 and Recall@10 of every case: [K, C, 2]."""
        found = {}
        for name, scores in self.scores.items():
            rows = [judge_scores(scores[shots], list(self.cut.queries(self.log, shots, self.query))) for shots in SHOTS]
            found[name] = np.stack(rows)
        return found

    def at(self, name: str, shots: int) -> list[Interval]:
        """Intervals of both metrics after K events."""
        return bootstrap(self.metrics[name][SHOTS.index(shots)], draws=DRAWS, seed=SEED)

    def ahead(self, peer: str, shots: int | None = None) -> list[Interval]:
        """Adapted minus a peer, paired: after K events, or on the mean over all K."""
        difference = self.metrics["adapted"] - self.metrics[peer]
        values = difference.mean(0) if shots is None else difference[SHOTS.index(shots)]
        return bootstrap(values, draws=DRAWS, seed=SEED)

    @property
    def peers(self) -> list[str]:
        """Names of the others, best first (nDCG@10, mean over K)."""
        others = [name for name in self.scores if name not in OWN]
        return sorted(others, key=lambda name: -float(self.metrics[name][..., 0].mean()))

    @property
    def names(self) -> list[str]:
        """All recommenders: innerloop's own, then the peers, best first."""
        return [*(name for name in OWN if name in self.scores), *self.peers]

    def headline(self) -> list[str]:
        """What there is to know, in words."""
        means = ", ".join(f"{self.at('adapted', shots)[0].mean:.3f} at K = {shots}" for shots in SHOTS)
        said = [f"{len(self.cut.users):,} users after exactly K events, nDCG@10 ({self.query} query): {means}."]
        own = self.ahead("start")[0]
        if self.about["inner_step"]:
            said.append(f"The inner step adds {own.mean:+.4f} [{own.low:+.4f}, {own.high:+.4f}] on the mean over K.")
        else:
            said.append("The inner step is off: on training users it does not pay for what is asked here.")
        if "stream" in self.scores:
            pull = compared(self.ahead("stream")[0], "the stream's, which stays the served one")
            said.append(f"Events 21 to 40 are not what comes next: this model is fitted for them and {pull}.")
        for name in self.peers[:1]:
            said.append(f"On the mean over K it is {compared(self.ahead(name)[0], f'the best peer, {TITLES[name]}')}.")
        return said

    def as_json(self) -> dict[str, Any]:
        """Plain values of everything that the report shows."""
        names = self.names
        return {
            **self.about,
            "cases": len(self.cut.users),
            "items": len(self.log.item_ids),
            "fitted_events": len(self.cut.fit),
            "headline": self.headline(),
            "notes": self.notes,
            "by_k": {name: {str(shots): _shown(self.at(name, shots)) for shots in SHOTS} for name in names},
            "adapted_minus": {name: _shown(self.ahead(name)) for name in names[1:]},
            "settings": self.settings,
            "training": self.training,
        }


def judge(
    model: Model,
    log: InteractionLog,
    cut: StaticCut,
    types: Types,
    *,
    query: Query,
    peers: Sequence[str],
    seed: int,
    notes: list[str],
    name: str,
    tell: Tell,
) -> StaticResult:
    """Score every case after K events, by the worker's own code and by each peer."""
    scores: dict[str, Scores] = {}
    if query == "gap":
        # the stream's model asks for what comes next; shown beside the one for what is asked here
        scores["stream"], _ = worker_scores(model.worker(log, types, ScoreTaker), log, cut, tell)
        model = for_later_events(model, log, cut.fit, seed=seed, tell=tell)
    scores["adapted"], scores["start"] = worker_scores(model.worker(log, types, ScoreTaker), log, cut, tell)
    fitted = interactions_of(log, cut.fit)
    least = NUM_HEAD if query == "gap" else 0
    trial = backtest_peers.static_trial(fitted, query=query)
    made = backtest_peers.make_peers(
        fitted, peers, trial, half_life=model.parameters.half_life, least_events=least, seed=seed, progress=tell
    )
    for named in made:
        scores[named.name] = {shots: _peer_scores(named.peer, log, cut, shots) for shots in SHOTS}
    about: dict[str, Any] = {"protocol": "static", "data": name, "query": query, "seed": seed}
    about["inner_step"] = model.parameters.use_inner_step
    settings = {named.name: named.settings for named in made if named.settings}
    return StaticResult(log, cut, query, scores, settings, model.report, about, notes)


def worker_scores(worker: OfflineWorker, log: InteractionLog, cut: StaticCut, tell: Tell) -> tuple[Scores, Scores]:
    """Logits before the (K+1)-th event of each case, adapted and start; rounds of one event per user."""
    assert isinstance(worker.ranker, ScoreTaker)  # noqa: S101 - for the type checker
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {shots: [] for shots in SHOTS}
    groups = [cut.histories[at : at + ROUND_USERS] for at in range(0, len(cut.histories), ROUND_USERS)]
    for number, group in enumerate(groups, 1):
        for position in range(max(SHOTS) + 1):
            worker.forget_counts()
            worker.ranker.taken = []
            # any row asks for a note, none for no note
            worker.ranker.expect(np.full((len(group), 1), 0 if position in SHOTS else -1))
            worker.apply(worker.micro_batch(list(log.events(np.array([history[position] for history in group])))))
            parts.setdefault(position, []).extend(worker.ranker.taken)
        tell("episodes", number, len(groups))
    both = [{shots: torch.cat([row[at] for row in parts[shots]]).numpy() for shots in SHOTS} for at in (0, 1)]
    return both[0], both[1]


def judge_scores(scores: NDArray[np.float32], queries: Iterable[tuple[Ints, Ints]]) -> Floats:
    """nDCG@10 and Recall@10 [C, 2] of scores [C, N]: masked items are not ranked, ties are broken by a seeded draw."""
    drawn = scores.astype(np.float64)
    drawn += 1e-9 * np.random.default_rng(0).random(drawn.shape)
    discount = 1 / np.log2(np.arange(TOP) + 2)
    found = np.zeros((len(scores), 2))
    for case, (masked, wanted) in enumerate(queries):
        drawn[case, masked] = -np.inf
        hits = np.isin(np.argsort(-drawn[case], kind="stable")[:TOP], wanted)
        found[case] = discount[hits].sum() / discount[: min(TOP, len(wanted))].sum(), hits.sum() / len(wanted)
    return found


def _peer_scores(peer: Peer, log: InteractionLog, cut: StaticCut, shots: int) -> NDArray[np.float32]:
    history = torch.from_numpy(np.stack([log.items[numbers[:shots]] for numbers in cut.histories]))
    known = Known(history, torch.full((len(history),), shots))
    scores: NDArray[np.float32] = scores_in_blocks(peer, known).numpy()
    return scores


def _shown(intervals: list[Interval]) -> dict[str, list[float]]:
    return {name: [round(v, 6) for v in interval] for name, interval in zip(METRICS, intervals, strict=True)}
