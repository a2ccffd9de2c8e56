"""Learners and adapters side by side: quality on the stream's phase `tune`, speed of a list, bytes kept of a user.

Every learner is meta-trained before the cut and replayed after it by `stream_replay`, switched on whatever validation
said, so that what it would have cost shows too. Minutes; left out of --quick.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models.figures import interval, set_ndcg, user_means
from models.learner_tuning import Method
from models.ranker import Ranker
from models.table_fitting import NUM_FACTORS
from pipeline.task_batches import largest_chunk
from tests.benchmarks import stream_replay
from tests.benchmarks.inner_step import tasks_of
from tests.benchmarks.measuring import medians, table
from tests.benchmarks.scene import TOP_N, Options, catalogue, parameters
from tests.benchmarks.stream import Stream, load_stream, train
from tests.factories import learnt_fields

METHODS = [
    Method(),
    *(Method(learner) for learner in ("ridge", "maml", "fomaml", "reptile", "meta-sgd")),
    *(Method(learner, adapter) for adapter in ("lora", "bottleneck") for learner in ("maml", "anil", "meta-sgd")),
    *(Method(learner, "vector", residuals) for residuals in ("events", "support") for learner in ("ridge", "maml")),
]
COLUMNS = ("learner", "adapter", "residuals", "bytes/user", "Ranker.rank, users/s")
QUALITY = ("validation", "set nDCG@10", "adapted - start", "training, CPU s")


def serving_rates(methods: list[Method], *, num_users: int, repeats: int) -> list[float]:
    """Users listed per CPU-second by `Ranker.rank` (top 50 of 1,682 items, S 60) under each method."""
    values = parameters()
    items = catalogue(values).tables
    chunk = largest_chunk(items.num_items)
    tasks, priors, _ = tasks_of(num_users, values, "cpu")

    def rank_all(ranker: Ranker) -> None:
        for first in range(0, num_users, chunk):
            rows = slice(first, first + chunk)
            ranker.rank(tasks.taken(rows), priors, TOP_N)

    ways: dict[str, Callable[[], object]] = {}
    for method in methods:
        fields: dict[str, Any] = {"residuals": method.residuals}
        if method != Method():
            fields |= learnt_fields(method.learner, method.adapter, num_factors=values.item_factors.shape[1])
        ways[" ".join(method)] = partial(rank_all, Ranker(replace(values, **fields), items))
    return [num_users / taken for taken in medians(ways, repeats=repeats).values()]


def quality(stream: Stream, home: Path, method: Method, *, seed: int = 0) -> list[str]:
    """Cells of QUALITY, unseen users."""
    began = time.process_time()
    trained = train(stream, home, seed=seed, method=method)
    spent = time.process_time() - began
    ranks = stream_replay.run(stream, replace(trained, use_inner_step=True), home, frozen=False)
    unseen = torch.from_numpy(stream.unseen)
    users = torch.from_numpy(stream.data.users[stream.events].astype("int64"))[unseen]
    adapted, start = (user_means(set_ndcg(one[unseen]), users) for one in ranks)
    gain = interval(adapted - start)
    return [
        "on" if trained.use_inner_step else "off",
        f"{interval(adapted).mean:.4f}",
        f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]",
        f"{spent:.0f}",
    ]


def main(options: Options) -> None:
    """Print the table, a row as soon as it is there."""
    methods = METHODS[:2] if options.quick else METHODS
    num_users, repeats = (64, 1) if options.quick else (512, 5)
    rates = serving_rates(methods, num_users=num_users, repeats=repeats)
    rows = [[*method, _bytes_kept(method), f"{rate:,.0f}"] for method, rate in zip(methods, rates, strict=True)]
    if not options.quick:
        home = Path.home() / ".innerloop"
        stream = load_stream(home, "tune")
        for row, method in zip(rows, methods, strict=True):
            row += quality(stream, home, method)
            print("  ".join(row), flush=True)
    print(table("learners side by side, as served", (*COLUMNS, *(() if options.quick else QUALITY)), rows))


def _bytes_kept(method: Method) -> str:
    """What a worker keeps of a user for the inner loop, whatever the adapter: a vector and a count, or nothing."""
    return str(4 * NUM_FACTORS + 8) if method.residuals == "honest" else "0"
