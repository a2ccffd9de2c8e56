"""Tables of the stream referee as JSON: all K and each bucket of K, what adaptation adds, what each part is worth.

    python -m tests.benchmarks.stream_tables judged --phase test --seeds 0,1,2 --out results/stream_test.json
    python -m tests.benchmarks.stream_tables judged --phase test --seeds 0 --partitions 4 --out …
    python -m tests.benchmarks.stream_tables ablation --phase tune --seeds 0 --out …

`judged` runs the worker's own code as `make referee` does; `ablation` the ranker's replay, each part switched off in
the same trained parameters (nothing is weighed anew), paired by user. Every look at `test` is written into LOG.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.figures import interval, set_ndcg, user_means
from models.meta_parameters import MetaParameters
from models.popularity import BUCKET_STARTS, bucket_of
from pipeline import arithmetic
from tests.benchmarks import stream_replay
from tests.benchmarks.referee import DRAWS, judged
from tests.benchmarks.stream import Stream, load_stream, train

FIGURES = {"set": 10, "next": 1}


def without_part(parameters: MetaParameters, column: int) -> MetaParameters:
    """Take a part off the start, where there is a support; popularity is column 0."""
    weights = parameters.part_weights.clone()
    weights[1:, column] = 0.0
    weights[1:] *= parameters.part_weights[1:].sum(1, keepdim=True) / weights[1:].sum(1, keepdim=True).clamp(min=1e-6)
    return replace(parameters, part_weights=weights)


def switched_off(parameters: MetaParameters) -> dict[str, MetaParameters]:
    """The same parameters with one thing off."""
    p = parameters
    names = ("popularity", *p.parts)
    parts = {f"{name} in the start": without_part(p, column) for column, name in enumerate(names)}
    return {
        "pairs online": replace(p, pairs_online=False),
        "vectors of new items online": replace(p, context_map=p.context_map[:0]),
        "bonus list, and pairs": replace(p, pairs_online=False, neighbour_items=torch.full_like(p.neighbour_items, -1)),
        **parts,
        "item biases": replace(p, item_bias=torch.zeros_like(p.item_bias)),
        "texts": replace(p, text_map=torch.zeros_like(p.text_map), shrinkage=1e-6),
        "decay of the support": replace(p, part_decays=torch.ones_like(p.part_decays)),
        "inner step": replace(p, use_inner_step=False),
        "trust region": replace(p, trust_radius=1e6),
        "gate": replace(p, gate_credit=1e6),
        "second memory": replace(p, memory_decays=p.memory_decays[:0]),
    }


def is_off(parameters: MetaParameters, without: MetaParameters) -> bool:
    """Whether validation had switched off already what `without` lacks."""
    ours, theirs = parameters.tensors(), without.tensors()
    same = all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    return same and parameters.metadata() == without.metadata()


def of_users(ranks: Tensor, users: Tensor, slots: int) -> Tensor:
    """NDCG@10 [U] of the first `slots` of the ranks [E, 10]."""
    return user_means(set_ndcg(ranks[:, :slots].double()), users)


def told(values: Tensor) -> list[float]:
    """Mean and interval, rounded."""
    return [round(value, 5) for value in interval(values, seed=1, draws=DRAWS)]


def table(adapted: Tensor, start: Tensor, users: Tensor, num_events: Tensor) -> dict[str, Any]:
    """Figures over all K and by bucket of K, mean over users, of ranks [E, 10]."""
    buckets = bucket_of(num_events)
    starts = (0, *BUCKET_STARTS)
    masks = {"all": torch.ones_like(buckets, dtype=torch.bool)}
    masks |= {f"K >= {first}": buckets == bucket for bucket, first in enumerate(starts)}
    rows: dict[str, Any] = {}
    for name, mask in masks.items():
        rows[name] = {"users": len(torch.unique(users[mask]))}
        for figure, slots in FIGURES.items():
            both = [of_users(ranks[mask], users[mask], slots) for ranks in (adapted, start)]
            rows[name] |= {figure: told(both[0]), f"{figure}, adapted - start": told(both[0] - both[1])}
    return rows


def judged_table(stream: Stream, parameters: MetaParameters, home: Path, partitions: int) -> dict[str, Any]:
    """Tabulate what the referee judges of unseen users."""
    columns = judged(stream, parameters, home, num_partitions=partitions)
    unseen = columns["unseen"].astype(bool)
    adapted, start = (torch.from_numpy(columns[name][unseen]) for name in ("ranks10", "ranks10_start"))
    users, num_events = (torch.from_numpy(columns[name][unseen].astype(np.int64)) for name in ("user", "K"))
    return table(adapted, start, users, num_events)


def ablation(stream: Stream, parameters: MetaParameters, home: Path, _: int) -> dict[str, Any]:
    """What users lose when a part is switched off, over all K."""
    unseen = torch.from_numpy(stream.unseen)
    users = torch.from_numpy(stream.data.users[stream.events].astype(np.int64))[unseen]

    def figures(one: MetaParameters, *, frozen: bool = False) -> dict[str, Tensor]:
        ranks = stream_replay.run(stream, one, home, frozen=frozen)[0][unseen]
        return {name: of_users(ranks, users, slots) for name, slots in FIGURES.items()}

    def lost(without: dict[str, Tensor]) -> dict[str, list[float]]:
        return {figure: told(whole[figure] - without[figure]) for figure in FIGURES}

    whole = figures(parameters)
    rows: dict[str, Any] = {"whole": {name: told(values) for name, values in whole.items()}}
    rows["loss without: popularity and pairs online"] = lost(figures(parameters, frozen=True))
    for name, changed in switched_off(parameters).items():
        off = is_off(parameters, changed)
        rows[f"loss without: {name}"] = "off by rule in this version" if off else lost(figures(changed))
        print(name, rows[f"loss without: {name}"], flush=True)
    return rows


WORK: dict[str, Callable[[Stream, MetaParameters, Path, int], dict[str, Any]]] = {
    "judged": judged_table,
    "ablation": ablation,
}


def main() -> None:
    """Parse, run seed by seed, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=list(WORK))
    parser.add_argument("--phase", choices=["tune", "test"], default="tune")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--partitions", type=int, default=1)
    parser.add_argument("--home", type=Path, default=Path.home() / ".innerloop")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arithmetic.prepare(1)
    stream = load_stream(arguments.home, arguments.phase)
    found: dict[str, Any] = {"phase": arguments.phase, "partitions": arguments.partitions}
    for seed in map(int, arguments.seeds.split(",")):
        parameters = train(stream, arguments.home, seed=seed)
        found[f"seed {seed}"] = WORK[arguments.work](stream, parameters, arguments.home, arguments.partitions)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"seed {seed}", json.dumps(next(iter(found[f"seed {seed}"].values()))), flush=True)


if __name__ == "__main__":
    main()
