"""Static episodes by cross-validation over all users of MovieLens-100K: more power, less honesty about time.

    python -m tests.benchmarks.static_folds [--query adjacent] [--peers item-knn,ease] [--out FILE.json]

Each fifth of the users is judged by what was fitted on all events of the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import backtest_static
from pipeline.backtest import Request, Scene, scene_of
from pipeline.backtest_figures import Floats, bootstrap
from pipeline.backtest_model import train
from pipeline.backtest_static import METRICS
from pipeline.interaction_log import InteractionLog
from pipeline.protocols import MIN_QUERY, NUM_HEAD, SHOTS, StaticCut
from pipeline.settings import Settings
from pipeline.stages import Stages, stages

FOLDS = 5
PEERS = "popular,popular-by-position,item-knn,ease,als"


def main() -> None:
    """Judge every fold; print and write the figures over all users with intervals, and the paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query", choices=["gap", "adjacent"], default="gap")
    parser.add_argument("--peers", default=PEERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with stages() as progress:
        scene = scene_of(Settings.load(), Request(data="ml-100k"), progress)
        judged = [judged_fold(scene, cut, arguments, progress) for cut in folds(scene.log, arguments.seed)]
    table = figures({name: np.concatenate([one[name] for one in judged], 1) for name in judged[0]})
    if arguments.out:
        about = {"query": arguments.query, "seed": arguments.seed, "folds": FOLDS}
        arguments.out.write_text(json.dumps({**about, "figures": table}, indent=1) + "\n")
    print("\n".join(lines(table)))


def folds(log: InteractionLog, seed: int) -> Iterator[StaticCut]:
    """Every fifth of the users, drawn with a seed, against all events of the others."""
    order = np.random.default_rng(seed).permutation(len(log.user_ids))
    for fold in np.array_split(order, FOLDS):
        histories = [np.flatnonzero((log.users == user) & log.positive) for user in np.sort(fold).tolist()]
        kept = [history for history in histories if len(history) >= NUM_HEAD + MIN_QUERY]
        users = np.array([int(log.users[history[0]]) for history in kept])
        yield StaticCut(np.flatnonzero(~np.isin(log.users, fold)), users, tuple(kept))


def judged_fold(scene: Scene, cut: StaticCut, arguments: argparse.Namespace, progress: Stages) -> dict[str, Floats]:
    """Metrics [K, C, 2] of innerloop and its peers on one fold."""
    seed, log = arguments.seed, scene.log
    model = train(log, cut.fit, scene.embeddings, encoder=scene.encoder.name, seed=seed, tell=progress)
    result = backtest_static.judge(
        model,
        log,
        cut,
        scene.types,
        query=arguments.query,
        peers=tuple(name for name in arguments.peers.split(",") if name),
        seed=seed,
        notes=[],
        name="ml-100k",
        tell=progress,
    )
    return {name: result.metrics[name] for name in result.names}


def figures(metrics: dict[str, Floats]) -> dict[str, dict[str, Any]]:
    """By recommender: both metrics by K with intervals, their mean over K, and how far innerloop is ahead of it."""
    return {
        name: {
            **{str(shots): _shown(values[at]) for at, shots in enumerate(SHOTS)},
            "mean over K": _shown(values.mean(0)),
            "adapted ahead, mean over K": _shown((metrics["adapted"] - values).mean(0)),
        }
        for name, values in metrics.items()
    }


def lines(table: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table as rows of the log, nDCG@10 and Recall@10."""
    for name, row in table.items():
        cells = (f"{row[str(shots)]['ndcg'][0]:.3f}/{row[str(shots)]['recall'][0]:.3f}" for shots in SHOTS)
        mean, ahead = row["mean over K"]["ndcg"], row["adapted ahead, mean over K"]["ndcg"]
        yield f"| {name} | {' | '.join(cells)} | {mean[0]:.4f} | {ahead[0]:+.4f} [{ahead[1]:+.4f}, {ahead[2]:+.4f}] |"


def _shown(values: Floats) -> dict[str, list[float]]:
    return {
        metric: [round(value, 5) for value in interval]
        for metric, interval in zip(METRICS, bootstrap(values), strict=True)
    }


if __name__ == "__main__":
    main()
