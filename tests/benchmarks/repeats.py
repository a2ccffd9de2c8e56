"""Repeat purchases, against the truth: what people take again, by innerloop and by whom it must not be below.

    python -m tests.benchmarks.repeats --seeds 0,1,2 [--shop favourites] [--out FILE.json]

Shops: `favourites`, 200 items of which nothing is known and which say nothing of one another: everybody has six of her
own, takes one of them with 60 %, and else anything by Zipf's law (500 users, 21 events each on average; every third
seed 600, 60 and 70 %); `baskets` and `habits` are plans of `pipeline.synthetic` with texts and tastes.
Each is judged by `innerloop backtest` on users whom training never saw: set nDCG@10, innerloop less each peer, paired
by user, with 95 % intervals, by bucket of K and joined over the shops. `best` lists by the probabilities that the next
choice is drawn from: of the next ten it is the best there can be where these stay, which is in `favourites` only.
Nothing may be clearly below a peer that repeats.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from models.figures import query_ranks
from pipeline.backtest import Request, run_stream
from pipeline.backtest_figures import Floats, Row, by_bucket, event_metrics, row
from pipeline.backtest_peers import TITLES
from pipeline.backtest_result import SHOWN_SEGMENT_USERS
from pipeline.settings import Settings
from pipeline.support import Ints
from pipeline.synthetic import DAY_MS, START_MS, Drawn, Plan, catalogue, draw_events, item_id, user_id, zipf

PEERS = ("popular-by-position", "item-knn", "item-knn-repeats", "repeats")
TO_BEAT = ("item-knn-repeats", "repeats")
FIGURE = "set_ndcg"
NUM_FAVOURITES = 6
# The plans of LOG.md, "The user side" and "Repeats, a held-out plan"
BASKETS = Plan(users=800, items=400, choices=60_000, activity=0.5, arrivals=0.9, sharpness=2.0)
BASKETS = replace(BASKETS, basket=5.0, repeats=0.65, habit=1.0, recency=0.98)
HABITS = Plan(users=600, items=400, choices=90_000, activity=0.4, arrivals=0.6, sharpness=2.5)
HABITS = replace(HABITS, basket=4.0, repeats=0.6, habit=0.8, recency=0.97)


class Shop(NamedTuple):
    """Choices in order of time, each with its truth, and the catalogue; empty where items have no texts."""

    choices: list[Drawn]
    items: list[dict[str, Any]]


class Figures(NamedTuple):
    """METRICS [E, M] of the events of unseen users by recommender, and their users and K [E]."""

    metrics: dict[str, Floats]
    users: Ints
    num_events: Ints

    def ahead(self, peer: str) -> list[Row]:
        """Innerloop less a peer, over all events and by bucket of K."""
        gains = self.metrics["adapted"] - self.metrics[peer]
        return [row("all", gains, self.users), *by_bucket(gains, self.users, self.num_events)]

    def reached(self) -> dict[str, float]:
        """The figure of every recommender."""
        return {name: row("all", values, self.users).metrics[FIGURE].mean for name, values in self.metrics.items()}


def favourites(seed: int, *, items: int = 200) -> Shop:
    """Users arrive over a hundred days and take something once a day on average."""
    users, mean, share = (600, 60, 0.7) if seed % 3 == 1 else (500, 21, 0.6)
    rng, popular = np.random.default_rng(seed), zipf(items, 0.7)
    choices = []
    for user in range(users):
        own = np.zeros(items)
        own[rng.choice(items, NUM_FAVOURITES, replace=False)] = 1 / NUM_FAVOURITES
        truth = share * own + (1 - share) * popular
        taken = rng.choice(items, rng.geometric(1 / mean), p=truth)
        days = rng.uniform(0, 100) + np.cumsum(rng.exponential(1.0, len(taken)))
        for number, (item, day) in enumerate(zip(taken.tolist(), days.tolist(), strict=True)):
            ids = {"event_id": f"c-{user}-{number}", "user_id": user_id(user), "item_id": item_id(item)}
            event = {"v": 1, **ids, "type": "purchase", "ts": START_MS + int(day * DAY_MS)}
            choices.append(Drawn(event, user, item, truth))
    return Shop(sorted(choices, key=lambda choice: choice.event["ts"]), [])


def planned(plan: Plan, seed: int) -> Shop:
    """A plan's shop."""
    plan = replace(plan, seed=seed)
    return Shop(list(draw_events(plan)), list(catalogue(plan)))


SHOPS: dict[str, Callable[[int], Shop]] = {
    "favourites": favourites,
    "baskets": lambda seed: planned(BASKETS, seed),
    "habits": lambda seed: planned(HABITS, seed),
}


def judge(shop: Shop, seed: int) -> Figures:
    """Backtest a shop as a file; `best` ranks by the truth."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "interactions.jsonl"), Path(folder, "items.jsonl")
        for file, rows in zip(files, ([choice.event for choice in shop.choices], shop.items), strict=True):
            file.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
        listed = str(files[1]) if shop.items else None
        request = Request(data=str(files[0]), items=listed, peers=PEERS, seed=seed, judged_users=200)
        result = run_stream(Settings.load(encoder="hashed", home=Path(folder)), request)
    assert len(result.log) == len(shop.choices), "an event that is no choice"
    numbers_of = [int(one.removeprefix("item-")) for one in result.log.item_ids]
    numbers = result.cut.judged[result.asked]
    truth = np.stack([truth[numbers_of] for truth in (shop.choices[number].truth for number in numbers.tolist())])
    wanted = torch.from_numpy(result.cut.next_items[result.asked])
    best = event_metrics(query_ranks(torch.from_numpy(truth), wanted).numpy().astype(np.float32))
    metrics = {name: values[result.unseen] for name, values in {**result.metrics, "best": best}.items()}
    return Figures(metrics, result.users[result.unseen], result.num_events[result.unseen])


def joined(shops: list[Figures]) -> Figures:
    """All shops' events, users numbered through."""
    metrics = {name: np.concatenate([one.metrics[name] for one in shops]) for name in shops[0].metrics}
    users = [one.users + number * 1_000_000 for number, one in enumerate(shops)]
    return Figures(metrics, np.concatenate(users), np.concatenate([one.num_events for one in shops]))


def tabulated(figures: Figures) -> dict[str, Any]:
    """What each reaches with its share of the best, and what innerloop is ahead of each peer by."""
    reached = figures.reached()
    return {
        "reached": {name: [round(own, 5), round(own / reached["best"], 4)] for name, own in reached.items()},
        "ahead": {
            peer: {one.label: [one.num_users, *one.metrics[FIGURE].as_list()] for one in figures.ahead(peer)}
            for peer in PEERS
        },
    }


def lines(table: dict[str, Any]) -> Iterator[str]:
    """A table as text."""
    yield " | ".join(
        f"{TITLES.get(name, name)} {own:.4f} ({part:.1%})" for name, (own, part) in table["reached"].items()
    )
    for peer, rows in table["ahead"].items():
        cells = [
            f"{label} ({num}) {mean:+.4f} [{low:+.4f}, {high:+.4f}]" for label, (num, mean, low, high) in rows.items()
        ]
        yield f"  less {TITLES[peer]}: {' | '.join(cells)}"


def clearly_below(table: dict[str, Any]) -> list[str]:
    """Buckets of K, of users enough to decide something, in which a peer that repeats is better than innerloop."""
    return [
        f"K {label} against {TITLES[peer]}"
        for peer in TO_BEAT
        for label, (num, _, _, high) in table["ahead"][peer].items()
        if high < 0 and num >= SHOWN_SEGMENT_USERS
    ]


def main() -> None:
    """Draw and judge shop by shop, then all of them together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shop", choices=list(SHOPS), default="favourites")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    shops, reached = list[Figures](), dict[str, Any]()
    for seed in map(int, chosen.seeds.split(",")):
        shops.append(judge(SHOPS[chosen.shop](seed), seed))
        table = tabulated(shops[-1])
        reached[f"seed {seed}"] = table["reached"]
        print(f"seed {seed}", *lines(table), sep="\n", flush=True)
    together = tabulated(joined(shops))
    print(f"all {len(shops)} shops", *lines(together), sep="\n")
    print("clearly below:", "; ".join(clearly_below(together)) or "nowhere")
    if chosen.out:
        chosen.out.write_text(json.dumps({"shop": chosen.shop, "reached": reached, "all": together}) + "\n")


if __name__ == "__main__":
    main()
