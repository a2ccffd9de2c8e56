"""Static episodes by cross-validation over all users of MovieLens-100K: more power, less honesty about time.

    python -m tests.benchmarks.static_folds [--query adjacent] [--peers item-knn]

Each fifth of the users is judged by what was fitted on all events of the others.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from pipeline import backtest_static
from pipeline.backtest import Request, scene_of
from pipeline.backtest_figures import bootstrap
from pipeline.backtest_model import train
from pipeline.protocols import MIN_QUERY, NUM_HEAD, SHOTS, StaticCut
from pipeline.settings import Settings
from pipeline.stages import stages

FOLDS = 5


def main() -> None:
    """Judge every fold, print nDCG@10 over all users with intervals, and the paired differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--query", choices=["gap", "adjacent"], default="gap")
    parser.add_argument("--peers", default="popular-by-position,item-knn")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with stages() as progress:
        scene = scene_of(Settings.load(), Request(data="ml-100k"), progress)
        log = scene.log
        order = np.random.default_rng(arguments.seed).permutation(len(log.user_ids))
        for fold in np.array_split(order, FOLDS):
            histories = [np.flatnonzero(log.users == user) for user in np.sort(fold).tolist()]
            kept = [history for history in histories if len(history) >= NUM_HEAD + MIN_QUERY]
            users = np.array([int(log.users[history[0]]) for history in kept])
            cut = StaticCut(np.flatnonzero(~np.isin(log.users, fold)), users, tuple(kept))
            encoder, seed = scene.encoder.name, arguments.seed
            model = train(log, cut.fit, scene.embeddings, encoder=encoder, seed=seed, tell=progress)
            peers = tuple(name for name in arguments.peers.split(",") if name)
            options = {"query": arguments.query, "peers": peers, "seed": seed, "notes": [], "name": "ml-100k"}
            results.append(backtest_static.judge(model, log, cut, scene.types, tell=progress, **options))
    metrics = {name: np.concatenate([one.metrics[name] for one in results], 1) for name in results[0].names}
    for name, values in metrics.items():
        shown = [bootstrap(values[at])[0] for at in range(len(SHOTS))]
        ahead = bootstrap((metrics["adapted"] - values).mean(0))[0]
        rows = "  ".join(f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in shown)
        print(f"{name:20s} {rows}   adapted ahead {ahead.mean:+.4f} [{ahead.low:+.4f}, {ahead.high:+.4f}]")


if __name__ == "__main__":
    main()
