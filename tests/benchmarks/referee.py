"""Write the file that the stream referee judges: every event ranked before it is learnt, by the worker's own code.

    python -m tests.benchmarks.referee --phase tune --seed 0 --out referee.npz

The protocol (events, cuts, order, masks, metrics) is that of the published table for MovieLens-100K; the file holds
user, K, rank, ranks10 and unseen for each event of the stream, and ranks10_start for the un-adapted start.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from models.figures import Interval, interval, set_ndcg, user_means
from models.meta_parameters import MetaParameters
from pipeline import arithmetic
from tests.benchmarks.stream import Stream, StreamWorker, load_stream, train

DRAWS = 2000
BATCH_EVENTS = 1024


def judged(
    stream: Stream, parameters: MetaParameters, home: Path, *, num_partitions: int = 1
) -> dict[str, NDArray[np.generic]]:
    """Stream what follows the cut that the parameters were trained before, give the file's columns."""
    worker = StreamWorker(stream, parameters, home, num_partitions=num_partitions)
    worker.remember_fitted_users()
    ranks, start = (np.full(stream.next_items.shape, -1, np.float32) for _ in range(2))
    for begin in track(range(0, len(stream.events), BATCH_EVENTS), "streaming"):
        places, noted = worker.ranks(range(begin, min(begin + BATCH_EVENTS, len(stream.events))))
        for columns, found in ((ranks, noted.ranks_adapted), (start, noted.ranks_start)):
            columns[places] = torch.where(found > 0, found, -1.0).numpy()
    user_number = np.unique(stream.data.users, return_inverse=True)[1][stream.events]
    return {
        "user": user_number.astype(np.int32),
        "K": stream.num_events.astype(np.int32),
        "rank": ranks[:, 0],
        "ranks10": ranks,
        "ranks10_start": start,
        "unseen": stream.unseen,
    }


def figures(columns: dict[str, NDArray[np.generic]]) -> dict[str, Interval]:
    """Set and next-item nDCG@10 over unseen users, and what adaptation adds to the start (2,000 draws, seed 1)."""
    unseen = columns["unseen"].astype(bool)
    users = torch.from_numpy(columns["user"][unseen].astype(np.int64))
    ranks = [torch.from_numpy(columns[name][unseen].astype(np.float64)) for name in ("ranks10", "ranks10_start")]
    adapted, start = (torch.stack([set_ndcg(found), set_ndcg(found[:, :1])]) for found in ranks)
    of_sets, of_next = user_means(adapted, users)
    sets_gain, next_gain = user_means(adapted - start, users)
    named = {
        "set nDCG@10": of_sets,
        "next-item nDCG@10": of_next,
        "set, adapted - start": sets_gain,
        "next item, adapted - start": next_gain,
    }
    return {name: interval(values, seed=1, draws=DRAWS) for name, values in named.items()}


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=["tune", "test"], default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--partitions", type=int, default=1, help="users and item counts spread over so many")
    parser.add_argument("--home", type=Path, default=Path.home() / ".innerloop")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arithmetic.prepare(1)
    started = time.monotonic()
    stream = load_stream(arguments.home, arguments.phase)
    parameters = train(stream, arguments.home, seed=arguments.seed)
    columns = judged(stream, parameters, arguments.home, num_partitions=arguments.partitions)
    np.savez_compressed(arguments.out, allow_pickle=False, **columns)
    for name, (mean, low, high) in figures(columns).items():
        print(f"{name:28s} {mean:.4f} [{low:.4f}, {high:.4f}]")
    print(f"{arguments.out}: {len(columns['K']):,} events, phase {arguments.phase}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
