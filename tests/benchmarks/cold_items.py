"""New items: lists among items that a version has never met, after none and after a few events of each.

    python -m tests.benchmarks.cold_items --phase tune --seeds 0,1,2 [--given 0,1,3,10] [--out FILE]

Protocol. Users by first event; a version is meta-trained on what came before the first event of the user half-way
through them, without the 15 % of items (drawn by the seed, among those with 20 events or more) that are to be new. The
worker's own code then goes through all events until four fifths of the users have come; of a new item's events the
first n are let through, the others never happen. The last fifth of the users, none seen before, then come with the
known items of their first 20 events, and the worker's list of each is read for new items only. Wanted are all new items
that she took later (users of 25 events or more, as in `coldstart.py`): Recall@10 (of all of them) and nDCG@10, mean
over users, 95 % bootstrap intervals, differences paired. Every new item has the same n (or all it ever had), so how
often an item was taken tells nothing; what is measured is what its takers tell: who they are and how soon they come.
Random order and the plain cosine of texts have here what QUALITY.md gives for them, so its figures for items never seen
are comparable.
Phase `test` is the whole data set, `tune` what came before its last fifth. Every look at `test` is written into LOG.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.encoder import resolve_encoder
from models.figures import interval
from models.meta_parameters import MetaParameters
from pipeline import arithmetic
from pipeline.catalogue import ListedItem, listed_rows
from pipeline.datasets import MovieLens100K, Phase, load_ml100k
from pipeline.embeddings import cached_embeddings
from pipeline.offline_worker import OfflineWorker
from pipeline.support import Ints, occurrence
from schemas.events import Interaction, Rejected, parse_interaction
from tests.benchmarks.referee import DRAWS
from tests.benchmarks.stream import Stream, train

LEAST_EVENTS = 20
NEW_SHARE = 0.15
TOP = 10
HEAD, LEAST_LENGTH = 20, 25
BATCH_EVENTS = 2048


@dataclass(frozen=True)
class Cold:
    """Row numbers of the data set in stream order: what is learnt from, what gives events, what judges.

    Attributes:
        new: ids of the new items, ascending.
        given: [rows] of `giving`, how many events its item has had there before; -1 for known items.
        heads: [rows] of `judging`, whether the event is one of the first 20 of a user who judges.
        judged: those who judge: first seen in `judging`, with 25 events or more there.
    """

    data: MovieLens100K
    new: Ints
    fit: Ints
    giving: Ints
    given: Ints
    judging: Ints
    heads: NDArray[np.bool_]
    judged: Ints


def load(home: Path, phase: Phase, seed: int) -> Cold:
    """Cut the data, and draw the new items."""
    data = load_ml100k(home)
    rows = data.rows("all") if phase == "test" else data.rows("fit", "test")
    users, first = np.unique(data.users[rows], return_index=True)
    begins = np.sort(first)
    middle, late = int(begins[len(begins) // 2]), int(begins[int(0.8 * len(begins))])
    items, counts = np.unique(data.items[rows], return_counts=True)
    often = items[counts >= LEAST_EVENTS]
    new = np.sort(np.random.default_rng(seed).choice(often, int(NEW_SHARE * len(often)), replace=False))
    fit, giving, judging = np.split(rows, [middle, late])
    fit = fit[~np.isin(data.items[fit], new)]
    given, had = np.full(len(giving), -1), dict.fromkeys(new.tolist(), 0)
    for place, item in enumerate(data.items[giving].tolist()):
        if item in had:
            given[place] = had[item]
            had[item] += 1
    position = occurrence(data.users[judging])
    late_users, lengths = np.unique(data.users[judging], return_counts=True)
    judged = np.intersect1d(users[first >= late], late_users[lengths >= LEAST_LENGTH])
    heads = (position < HEAD) & np.isin(data.users[judging], judged)
    return Cold(data, new, fit, giving, given, judging, heads, judged)


def served(cold: Cold, parameters: MetaParameters, home: Path, num_given: int) -> dict[int, list[str]]:
    """New items in the order of each judged user's last list, after `num_given` events of each new item."""
    films = cold.data.films
    items = [ListedItem(film.item_id, number, film.text, True, True) for number, film in enumerate(films, 1)]
    texts = [item.text for item in listed_rows(items)]
    embeddings = cached_embeddings(resolve_encoder("auto"), texts, home / "cache")
    worker = OfflineWorker(parameters, items, embeddings, capacity=1000, top_n=len(films))
    worker.remember(_events(cold.data, cold.fit))
    rows = np.concatenate([cold.giving[cold.given < num_given], _known_heads(cold)])
    new, lists = {str(item) for item in cold.new.tolist()}, dict[int, list[str]]()
    for outcome in worker.replay(_events(cold.data, rows), batch_events=BATCH_EVENTS):
        for user, listed in worker.listed(outcome, len(films)).items():
            lists[int(user)] = [item for item in listed if item in new]
    return {user: lists[user] for user in cold.judged.tolist() if user in lists}


def by_text(cold: Cold, home: Path) -> dict[int, list[str]]:
    """New items by the mean cosine of their texts to those of the user's items."""
    films = cold.data.films
    embeddings = cached_embeddings(resolve_encoder("auto"), [film.text for film in films], home / "cache")
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    row_of = {film.item_id: row for row, film in enumerate(films)}
    new = [str(item) for item in cold.new.tolist()]
    found, heads = {}, _known_heads(cold)
    for user in cold.judged.tolist():
        had = [row_of[str(item)] for item in cold.data.items[heads[cold.data.users[heads] == user]].tolist()]
        scores = (embeddings[[row_of[item] for item in new]] @ embeddings[had].T).sum(1)
        found[user] = [new[place] for place in scores.argsort(descending=True).tolist()]
    return found


def at_random(cold: Cold) -> dict[int, list[str]]:
    """New items in any order."""
    draw = np.random.default_rng(0)
    return {user: [str(item) for item in draw.permutation(cold.new).tolist()] for user in cold.judged.tolist()}


def figures(cold: Cold, lists: dict[int, list[str]]) -> Tensor:
    """Recall@10 and nDCG@10 [2, U] of the judged users who took a new item."""
    discount = 1 / np.log2(np.arange(TOP) + 2)
    rows = cold.judging[np.isin(cold.data.items[cold.judging], cold.new) & ~cold.heads]
    taken: dict[int, set[str]] = {}
    for user, item in zip(cold.data.users[rows].tolist(), cold.data.items[rows].tolist(), strict=True):
        taken.setdefault(user, set()).add(str(item))
    found = []
    for user in sorted(taken.keys() & set(cold.judged.tolist())):
        hits = np.array([item in taken[user] for item in lists.get(user, [])[:TOP]])
        ideal = discount[: min(TOP, len(taken[user]))].sum()
        found.append((hits.sum() / len(taken[user]), (discount[: len(hits)] * hits).sum() / ideal))
    return torch.tensor(found).T


def table(cold: Cold, parameters: MetaParameters, home: Path, given: Iterable[int]) -> dict[str, Tensor]:
    """Figures [2, U] of the served lists and of two peers that need no event."""
    rows = {"at random": figures(cold, at_random(cold)), "cosine of texts": figures(cold, by_text(cold, home))}
    for num in given:
        rows[f"{num} events"] = figures(cold, served(cold, parameters, home, num))
    return rows


def told(values: Tensor) -> list[float]:
    """Mean and interval, rounded."""
    return [round(value, 4) for value in interval(values, seed=1, draws=DRAWS)]


def _known_heads(cold: Cold) -> Ints:
    """Rows of the judging users' first events, without new items."""
    heads: Ints = cold.judging[cold.heads & ~np.isin(cold.data.items[cold.judging], cold.new)]
    return heads


def _events(data: MovieLens100K, rows: Ints) -> list[Interaction | Rejected]:
    return [
        parse_interaction(str(event["user_id"]).encode(), json.dumps(event).encode(), event["ts"])
        for event in data.events(rows)
    ]


def main() -> None:
    """Parse; meta-train and judge seed by seed; all seeds' users together at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=["tune", "test"], default="tune")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--given", default="0,1,3,10")
    parser.add_argument("--home", type=Path, default=Path.home() / ".innerloop")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arithmetic.prepare(1)
    given = [int(num) for num in arguments.given.split(",")]
    everything: dict[str, list[Tensor]] = {}
    for seed in map(int, arguments.seeds.split(",")):
        cold = load(arguments.home, arguments.phase, seed)
        nothing = np.zeros(0, np.int64)
        stream = Stream(cold.data, cold.fit, nothing, nothing, nothing[:, None], nothing.astype(bool))
        parameters = train(stream, arguments.home, seed=seed)
        for name, values in table(cold, parameters, arguments.home, given).items():
            everything.setdefault(name, []).append(values)
            print(f"seed {seed}, {len(cold.new)} new items, {name}: recall@10, nDCG@10", *map(told, values), flush=True)
    joined = {name: torch.cat(values, 1) for name, values in everything.items()}
    first = joined[f"{given[0]} events"]
    report = {
        name: {"recall@10": told(values[0]), "ndcg@10": told(values[1])}
        | {
            f"{figure}, gained": told(gain)
            for figure, gain in zip(("recall@10", "ndcg@10"), values - first, strict=True)
        }
        for name, values in joined.items()
    }
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"phase": arguments.phase, "seeds": arguments.seeds, **report}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
