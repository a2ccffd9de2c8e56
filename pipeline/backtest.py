"""The wiring of `backtest`: read → cut → meta-train → judge innerloop and its peers on the same events → result.

Ranks are of all items that the user has not had (where people do not take things again: that is learnt from the fit
part), for everybody alike; everything is fitted and chosen on events before the first event of the users to be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from models.encoder import TextEncoder, resolve_encoder
from models.meta_parameters import MetaParameters
from models.recipe import DEFAULT, Recipe
from pipeline import backtest_model, backtest_peers, backtest_static
from pipeline.adaptation import Types
from pipeline.backtest_data import load_log
from pipeline.backtest_result import Contest, Cost, StreamResult
from pipeline.interaction_log import InteractionLog
from pipeline.protocols import Phase, Query, StaticCut, StreamCut, cut_static, cut_stream
from pipeline.settings import Settings
from pipeline.stages import Stages, stages
from pipeline.support import Ints


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to judge, and how.

    Attributes:
        data: a file, or the name of a data set.
        peers: names of `backtest_peers.ALL`.
        max_users: users kept of a larger file.
        judged_users: most users who are ranked for. Stream: unseen and known each, and all events are learnt.
        recipe: hyperparameters of meta-training.

    """

    data: str
    items: str | None = None
    mapping: Path | None = None
    phase: Phase = "test"
    query: Query = "gap"
    peers: Sequence[str] = field(default_factory=backtest_peers.usual)
    seed: int = 0
    max_users: int = 50_000
    judged_users: int = 2_000
    num_partitions: int = 1
    recipe: Recipe = DEFAULT


@dataclass(frozen=True)
class Scene:
    """What both protocols begin with."""

    log: InteractionLog
    notes: list[str]
    types: Types
    encoder: TextEncoder
    embeddings: Tensor


def run_stream(settings: Settings, request: Request) -> StreamResult:
    """Judge the stream: rank before every event, then learn it. Raises ConfigurationError for what to correct."""
    backtest_peers.check_available(request.peers)
    torch.set_num_threads(settings.torch_threads)
    with stages() as progress:
        scene = scene_of(settings, request, progress)
        cut = cut_stream(scene.log, request.phase)
        queries, note = _limited(scene.log, cut, request.judged_users)
        model = _model(scene, cut.fit, request, progress)
        streamed = backtest_model.stream(
            model, scene.log, cut, queries, scene.types, num_partitions=request.num_partitions, tell=progress
        )
        contests = {
            "adapted": Contest(streamed.adapted, {}, Cost(model.seconds, streamed.event_seconds, streamed.user_bytes)),
            "start": Contest(streamed.start, {}, None),
        }
        contests |= _peers(scene, cut, queries, request, model.parameters, progress)
    return StreamResult(
        log=scene.log,
        cut=cut,
        asked=queries[:, 0] >= 0,
        contests=contests,
        streamed=streamed,
        embeddings=scene.embeddings.numpy(),
        training=model.report,
        about={
            "protocol": "stream",
            "data": Path(request.data).name,
            "phase": request.phase,
            "seed": request.seed,
            "partitions": request.num_partitions,
            "repeats_listed": model.parameters.recommend_seen,
        },
        notes=[*scene.notes, *note],
    )


def run_static(settings: Settings, request: Request) -> backtest_static.StaticResult:
    """Judge static episodes: what is known after exactly K events. Raises ConfigurationError for what to correct."""
    backtest_peers.check_available(request.peers)
    torch.set_num_threads(settings.torch_threads)
    with stages() as progress:
        scene = scene_of(settings, request, progress)
        cut, note = limited_cases(scene.log, cut_static(scene.log), request.judged_users)
        model = _model(scene, cut.fit, request, progress)
        return backtest_static.judge(
            model,
            scene.log,
            cut,
            scene.types,
            query=request.query,
            peers=request.peers,
            seed=request.seed,
            notes=[*scene.notes, *note],
            name=Path(request.data).name,
            tell=progress,
        )


def scene_of(settings: Settings, request: Request, progress: Stages) -> Scene:
    """Read the data and encode its texts."""
    types = Types.of(settings.event_types)
    log, notes = load_log(
        request.data,
        items=request.items,
        mapping=request.mapping,
        most_users=request.max_users,
        types=types,
        home=settings.home,
        progress=progress,
    )
    notes += backtest_peers.notes_on(request.peers)
    encoder = resolve_encoder(settings.encoder, device=settings.device)
    return Scene(log, notes, types, encoder, backtest_model.embed(log, encoder, settings.home, progress))


def _model(scene: Scene, fit: Ints, request: Request, progress: Stages) -> backtest_model.Model:
    return backtest_model.train(
        scene.log,
        fit,
        scene.embeddings,
        encoder=scene.encoder.name,
        seed=request.seed,
        tell=progress,
        recipe=request.recipe,
    )


def _peers(
    scene: Scene, cut: StreamCut, queries: Ints, request: Request, parameters: MetaParameters, progress: Stages
) -> dict[str, Contest]:
    repeats = parameters.recommend_seen
    again = [name for name in ("repeats", "item-knn-repeats") if repeats and name not in request.peers]
    names = [*request.peers, *again]
    fitted = backtest_model.interactions_of(scene.log, cut.fit)
    everything = backtest_model.interactions_of(scene.log, np.concatenate([cut.fit, cut.stream]))
    trial = backtest_peers.stream_trial(fitted, repeats=repeats, seed=request.seed)
    made = backtest_peers.make_peers(
        fitted, names, trial, half_life=parameters.half_life, seed=request.seed, progress=progress
    )
    found = {}
    for named in made:
        judged, seconds = backtest_peers.judge_stream(
            named, everything, len(fitted), queries, repeats=repeats, progress=progress
        )
        found[named.name] = Contest(judged, named.settings, Cost(named.fit_seconds, seconds, None))
    return found


def _limited(log: InteractionLog, cut: StreamCut, most: int) -> tuple[Ints, list[str]]:
    """What is looked for [S, 10], -1 throughout for users beyond the most that are judged (chosen by hash)."""
    kept, shares = np.zeros(len(cut.judged), bool), []
    users = log.users[cut.judged]
    for mask, kind in ((cut.unseen, "unseen"), (~cut.unseen, "known")):
        group = np.unique(users[mask])
        kept |= mask & np.isin(users, _by_hash(log, group)[:most])
        if len(group) > most:
            shares.append(f"{most:,} of {len(group):,} {kind} users")
    return np.where(kept[:, None], cut.next_items, -1), _said(shares)


def limited_cases(log: InteractionLog, cut: StaticCut, most: int) -> tuple[StaticCut, list[str]]:
    """The same episodes with at most so many users: scores of all items are kept for each of them."""
    num = len(cut.users)
    if num <= most:
        return cut, []
    kept = np.flatnonzero(np.isin(cut.users, _by_hash(log, cut.users)[:most]))
    fewer = replace(cut, users=cut.users[kept], histories=tuple(cut.histories[case] for case in kept.tolist()))
    return fewer, _said([f"{most:,} of {num:,} users"])


def _by_hash(log: InteractionLog, users: Ints) -> list[int]:
    return sorted(users.tolist(), key=lambda user: (crc32(log.user_ids[user].encode()), user))


def _said(shares: list[str]) -> list[str]:
    return [f"Judged are {' and '.join(shares)}, chosen by a hash of the id (--judged-users)."] if shares else []
