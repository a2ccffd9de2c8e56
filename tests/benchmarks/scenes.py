"""New scenes: a version meets a catalogue of which it knows the texts only, and people of whom it knows nothing.

    python -m tests.benchmarks.scenes [same] [other] [Drama] [Comedy] [--seed S]

`same`: synthetic, other items of the same topics; `other`: the same with words that the version never read; a genre of
MovieLens-100K: a version learnt from the other films (phase `tune`, before the cut) meets that genre's films after it.
Popularity begins at nothing and moves online. Printed: set nDCG@10 over popularity alone, by K, paired over users with
95 % intervals; nothing may be clearly below zero (negative transfer). `at full weight` is what happened before.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.encoder import HashedBagOfWords, resolve_encoder
from models.episodes import Interactions
from models.figures import interval, query_ranks, set_ndcg, user_means
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.popularity import BUCKET_STARTS, NUM_BUCKETS, bucket_of
from models.ranker import Ranker
from models.replay import Replay, honest_residuals, replay_side_by_side, states_before
from models.table_fitting import Window
from pipeline.embeddings import cached_embeddings
from pipeline.support import Ints
from pipeline.synthetic import Plan, catalogue
from tests.benchmarks.stream import load_stream
from tests.factories import synthetic_interactions

HOME = Path.home() / ".innerloop"
PLAN = Plan(users=400, items=300, choices=20_000, activity=0.5, arrivals=0.8)


class Domain(NamedTuple):
    """Interactions with the items of a catalogue, embeddings [N, T] and ids of these."""

    events: Interactions
    embeddings: Tensor
    ids: tuple[str, ...]


class Figures(NamedTuple):
    """Set nDCG@10 [E] of popularity, of the start as served, with the adapter, and of the start at full weight."""

    popular: Tensor
    start: Tensor
    adapted: Tensor
    full: Tensor


def synthetic(*, other: bool, seed: int) -> tuple[Domain, Domain]:
    """The version's domain, and a new one of other users and items."""
    plan = replace(PLAN, seed=seed + 7, users=200, choices=10_000)
    home, new = (Domain(*synthetic_interactions(one)) for one in (replace(PLAN, seed=seed), plan))
    if other:
        listed = sorted(catalogue(plan), key=lambda item: str(item["item_id"]).encode())
        foreign = [" ".join(word[::-1] for word in item["text"].split()) for item in listed]
        new = new._replace(embeddings=HashedBagOfWords(64).encode(foreign))
    return home, new


def movielens(genre: str) -> tuple[Domain, Domain]:
    """Films of other genres before the cut, and this genre's after it."""
    stream = load_stream(HOME, "tune")
    films = sorted(stream.data.films, key=lambda film: film.item_id.encode())
    embeddings = cached_embeddings(resolve_encoder("auto"), [film.text for film in films], HOME / "cache")
    row_of = {film.item_id: row for row, film in enumerate(films)}
    chosen = torch.tensor([genre in film.genres for film in films])

    def domain(rows: Ints, mask: Tensor) -> Domain:
        items = torch.tensor([row_of[str(item)] for item in stream.data.items[rows]])
        kept, number = mask[items], torch.cumsum(mask, 0) - 1
        users = torch.from_numpy(stream.data.users[rows].astype(np.int64))[kept]
        times = torch.from_numpy(stream.data.seconds[rows] * 1000)[kept]
        events = Interactions(users, number[items[kept]], times, torch.ones(len(users)), int(mask.sum()))
        return Domain(events, embeddings[mask], tuple(films[row].item_id for row in mask.nonzero()[:, 0].tolist()))

    return domain(stream.fit, ~chosen), domain(stream.events, chosen)


def met(parameters: MetaParameters, new: Domain) -> tuple[Replay, Figures]:
    """Replay a new domain's events from the first on."""
    tables = assemble_items(parameters, new.embeddings, torch.full((len(new.ids),), -1))

    def trusting(share: float) -> Ranker:
        return Ranker(replace(parameters, scene_shares=torch.full((NUM_BUCKETS,), share)), tables)

    ranker, everything = Ranker(parameters, tables), torch.ones(len(new.events), dtype=torch.bool)
    rankers = [trusting(0.0), ranker, trusting(1.0)]
    popular, start, full = replay_side_by_side(rankers, new.events, 0, everything, lambda *_: None)
    factors, step = tables.vectors[:, -ranker.state_size :], ranker.inner_step
    residuals = honest_residuals(start, factors, step.tau) - step.residual_mean
    deviation = step.deviation(*states_before(start.users, residuals, step.discount), start.num_events)
    adapted = start.start + deviation @ factors.T if parameters.use_inner_step else start.start
    scores = (popular.start, start.start, adapted, full.start)
    return start, Figures(*(set_ndcg(query_ranks(one, start.query)) for one in scores))


def rows(replay: Replay, figures: Figures) -> Iterator[str]:
    """Gains over popularity, over all K and by bucket of K."""
    buckets = bucket_of(replay.num_events)
    everything = torch.ones_like(buckets, dtype=torch.bool)
    firsts = (0, *BUCKET_STARTS)
    cuts = [("all", everything), *((f"K>={first}", buckets == place) for place, first in enumerate(firsts))]
    for name, mask in ((name, mask) for name, mask in cuts if mask.any()):
        users = replay.users[mask]
        cells = [f"popularity {float(user_means(figures.popular[mask], users).mean()):.4f}"]
        for kind, values in zip(("start", "adapted", "at full weight"), figures[1:], strict=True):
            mean, low, high = interval(user_means((values - figures.popular)[mask], users))
            cells.append(f"{kind} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        yield f"  {name} ({len(torch.unique(users))} users): {' | '.join(cells)}"


def main() -> None:
    """Meta-train at home, meet the new scene."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="*", default=["same", "other", "Drama", "Comedy"])
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for scene in chosen.scenes:
        made = synthetic(other=scene == "other", seed=chosen.seed) if scene in ("same", "other") else movielens(scene)
        home, new = made
        parameters, found = meta_train(
            Window(home.events, home.embeddings, item_ids=home.ids, encoder="any", seed=chosen.seed)
        )
        print(scene, {name: found[name] for name in ("scene_shares", "gain_in_new_scenes", "inner_step")})
        print("\n".join(rows(*met(parameters, new))), flush=True)


if __name__ == "__main__":
    main()
