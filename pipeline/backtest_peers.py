"""The peers of a backtest: made and tuned on the fit part, then asked before every event of the stream.

Tuning sees validation users of the fit part only, the same ones for every peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import popularity
from models.episodes import History, Interactions, earlier, following
from models.figures import query_ranks
from models.peers.item_items import Ease, ItemKNN
from models.peers.mixed import Examples, Mixed, choose, fit_mixed
from models.peers.peer import Known, Peer
from models.peers.popularity import Popular, PositionPopular, Repeats
from models.validation_users import split
from pipeline.backtest_figures import Judged
from pipeline.protocols import MIN_QUERY, NUM_HEAD, NUM_QUERY, SHOTS, Query
from pipeline.support import Ints
from schemas.errors import ConfigurationError

ALL = (
    "popular",
    "popular-online",
    "popular-by-position",
    "item-knn",
    "ease",
    "als",
    "sasrec",
    "repeats",
    "item-knn-repeats",
)
DEFAULT = ("popular", "popular-online", "popular-by-position", "item-knn", "ease", "als")
TITLES = {
    "popular": "popularity, fitted once",
    "popular-online": "popularity, online",
    "popular-by-position": "popularity by position, online",
    "item-knn": "ItemKNN + prior, online",
    "ease": "EASE + prior, refitted",
    "als": "ALS fold-in + prior",
    "sasrec": "SASRec, growing sequence",
    "repeats": "repeat the support + prior",
    "item-knn-repeats": "ItemKNN + prior + repeat",
    "start": "innerloop's start (not adapted)",
    "adapted": "innerloop, adapted",
    "stream": "innerloop, the stream's model",
}
MOST_HISTORY = 2000
BLOCK = 256
EXAMPLES_PER_BUCKET = 300
LISTED, QUERY = 10, 10
Tell = Callable[[str, int, int], None]


class PeerUnavailable(ConfigurationError):
    """A peer's library is not installed: install the extra that the message names, or leave the peer out."""


@dataclass(frozen=True)
class Named:
    """A peer ready to be judged: what was chosen for it, and what its fit cost."""

    name: str
    peer: Peer
    settings: dict[str, Any]
    fit_seconds: float


def usual() -> tuple[str, ...]:
    """The peers of a backtest that names none: those of DEFAULT that are installed."""
    return tuple(name for name in DEFAULT if name != "als" or find_spec("implicit") is not None)


def notes_on(names: Sequence[str]) -> list[str]:
    """Say which usual peer is missing because it is not installed."""
    left_out = tuple(names) == usual() != DEFAULT
    return ["ALS was left out: it needs implicit (pip install 'innerloop[als]')."] if left_out else []


def check_available(names: Iterable[str]) -> None:
    """Raises PeerUnavailable before any work is done."""
    for name in names:
        if name not in ALL:
            raise ConfigurationError(f"--peers: {name!r} is none of {', '.join(ALL)}")
        if name == "als" and find_spec("implicit") is None:
            raise PeerUnavailable(
                "the peer als needs implicit: pip install 'innerloop[als]', or leave als out of --peers"
            )


def make_peers(
    fitted: Interactions,
    names: Iterable[str],
    trial: Trial,
    *,
    half_life: float,
    least_events: int = 0,
    seed: int = 0,
    progress: Tell,
) -> list[Named]:
    """Fit and tune each peer.

    `half_life` of popularity by position, in events: the one that innerloop chose, so that nobody has a better prior.
    `least_events`: what is asked for comes that late in a user's history.
    """
    popular = partial(PositionPopular, online=True, half_life=half_life, least_events=least_events)
    chosen, made = list(names), []
    for place, name in enumerate(chosen):
        progress("fit peers", place, len(chosen))
        started = time.process_time()
        peer, settings = _make(name, (trial.early, fitted), trial.examples, popular, seed)
        made.append(Named(name, peer, settings, time.process_time() - started))
    progress("fit peers", len(chosen), len(chosen))
    return made


def _make(
    name: str,
    windows: tuple[Interactions, Interactions],
    examples: Examples,
    popular: Callable[[Interactions], Peer],
    seed: int,
) -> tuple[Peer, dict[str, Any]]:
    fitted = windows[1]
    if name in ("popular", "popular-online"):
        return Popular(fitted, online=name == "popular-online"), {}
    if name == "popular-by-position":
        return popular(fitted), {}
    (make, settings), prior = _tuned(name, seed), popular
    if name == "item-knn-repeats":
        knn, grid = _tuned("item-knn", seed)
        known = choose(lambda setting: knn(windows[0], setting), grid, popular(windows[0]), examples)

        def with_neighbours(window: Interactions) -> Peer:
            return Mixed(knn(window, known.setting), popular(window), known.weights)

        prior = with_neighbours

    peer, choice = fit_mixed(make, prior, windows, settings, examples)
    weights = [round(weight, 1) for weight in choice.weights.tolist()]
    return peer, {**choice.setting, "prior_weights": weights, "validation_set_ndcg": round(choice.figure, 4)}


Setting = dict[str, float]
# The best of eight on MovieLens-100K's `tune` phase (tests/benchmarks/LOG.md); each costs up to two minutes to train
SASREC: tuple[Setting, ...] = tuple(
    {"width": width, "blocks": blocks, "dropout": dropout, "learning_rate": 3e-3}
    for width, blocks, dropout in ((32, 2, 0.2), (64, 2, 0.5), (128, 1, 0.5))
)


def _tuned(name: str, seed: int) -> tuple[Callable[[Interactions, Setting], Peer], list[Setting]]:
    """How a peer with settings is made, and the settings to choose from."""
    if name == "item-knn":
        grid = [{"shrink": shrink, "decay": decay} for shrink in (5.0, 20.0, 100.0) for decay in (0.9, 0.97, 1.0)]
        return lambda window, setting: ItemKNN(window, **setting), grid
    if name == "ease":
        grid = [{"ridge": ridge, "decay": decay} for ridge in (300.0, 1000.0, 3000.0) for decay in (0.9, 0.97, 1.0)]
        return lambda window, setting: Ease(window, **setting), grid
    if name in ("repeats", "item-knn-repeats"):
        return lambda window, setting: Repeats(window, **setting), [{"decay": decay} for decay in (0.9, 0.97, 1.0)]
    if name == "sasrec":
        from models.peers.sasrec import SASRec, Sizes

        return lambda window, setting: SASRec(window, Sizes.of(setting), seed=seed), list(SASREC)
    from models.peers.als import FoldedALS

    fits = ((20.0, 4.0), (60.0, 4.0), (20.0, 2.0), (100.0, 10.0))
    grid = [{"ridge": ridge, "alpha": alpha, "decay": decay} for ridge, alpha in fits for decay in (0.9, 0.97)]
    return lambda window, setting: FoldedALS(window, **setting, seed=seed), grid


@dataclass(frozen=True)
class Trial:
    """The earlier part of the fit, and validation examples by users whose first event comes after it."""

    early: Interactions
    examples: Examples


def stream_trial(fitted: Interactions, *, repeats: bool, seed: int) -> Trial:
    """Examples for the next ten items, a sample of every bucket of K."""
    history = History.of(fitted.users)
    cut, unseen = split(fitted)
    buckets = popularity.bucket_of(history.position)
    generator = torch.Generator().manual_seed(seed)
    sample = []
    for bucket in range(popularity.NUM_BUCKETS):
        candidates = (unseen & (buckets == bucket)).nonzero()[:, 0]
        sample.append(candidates[torch.randperm(len(candidates), generator=generator)[:EXAMPLES_PER_BUCKET]])
    events = torch.cat(sample).sort().values
    known = known_before(fitted, history, events)
    query = following(history, fitted.items, events, QUERY)
    return Trial(fitted.select(torch.arange(cut)), Examples(known, query, _masked(known, fitted.num_items, repeats)))


def static_trial(fitted: Interactions, *, query: Query) -> Trial:
    """Examples after K events, K in SHOTS, for what the static protocol asks."""
    history = History.of(fitted.users)
    cut, unseen = split(fitted)
    long = unseen & (history.length >= NUM_HEAD + MIN_QUERY)
    events = (long & torch.isin(history.position, torch.tensor(SHOTS))).nonzero()[:, 0]
    after = following(history, fitted.items, events, NUM_HEAD + NUM_QUERY)
    position = history.position[events]
    known = known_before(fitted, history, events)
    masked = known.had(fitted.num_items) > 0
    if query == "adjacent":
        return Trial(fitted.select(torch.arange(cut)), Examples(known, after[:, :NUM_QUERY], masked))
    skipped = (NUM_HEAD - position)[:, None] + torch.arange(NUM_QUERY)
    head = torch.where(torch.arange(NUM_HEAD) < (NUM_HEAD - position)[:, None], after[:, :NUM_HEAD], -1)
    masked |= Known(head, position).had(fitted.num_items) > 0
    return Trial(fitted.select(torch.arange(cut)), Examples(known, after.gather(1, skipped), masked))


def known_before(interactions: Interactions, history: History, events: Tensor) -> Known:
    """Histories before events [U] of interactions."""
    position = history.position[events]
    width = min(int(position.max()) if len(events) else 0, MOST_HISTORY)
    return Known(earlier(history, interactions.items, events, width), position)


def _masked(known: Known, num_items: int, repeats: bool) -> Tensor:
    if repeats:
        return torch.zeros(len(known.num_events), num_items, dtype=torch.bool)
    return known.had(num_items) > 0


def judge_stream(
    named: Named, everything: Interactions, first: int, queries: Ints, *, repeats: bool, progress: Tell
) -> tuple[Judged, float]:
    """Ask before every event from number `first` on, then let the peer learn it; also CPU seconds an event.

    `queries` [S, Q]: rows to be found, -1 = none; an event without any is not judged. Peers learn after every BLOCK
    events: what a block brings is known from the next one on.
    """
    history, num_items = History.of(everything.users), everything.num_items
    ranks, lists = [], []
    total, started = len(everything), time.process_time()
    for begin in range(first, total, BLOCK):
        events = torch.arange(begin, min(begin + BLOCK, total))
        known = known_before(everything, history, events)
        query = torch.from_numpy(queries[events.numpy() - first])
        asked = (query >= 0).any(1).nonzero()[:, 0]
        if len(asked):
            some = known.select(asked)
            scores = named.peer.scores(some).masked_fill(_masked(some, num_items, repeats), -torch.inf)
            ranks.append(query_ranks(scores, query[asked]).numpy())
            lists.append(scores.topk(min(LISTED, num_items), 1).indices.numpy())
        named.peer.learn(known, everything.items[events])
        progress(f"judge {named.name}", begin + len(events) - first, total - first)
    judged = Judged(np.concatenate(ranks).astype(np.float32), np.concatenate(lists))
    return judged, (time.process_time() - started) / max(len(judged.ranks), 1)
