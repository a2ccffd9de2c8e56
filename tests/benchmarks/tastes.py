"""Changing tastes, against the truth: how a served version follows users whose taste changes at their 60th choice.

    python -m tests.benchmarks.tastes [--seed 0] [--users 800] [--decay 0.97] [--discount 0.95]

Half of the users are learnt from, the others are judged, by the expected DCG@10 of their list under the distribution
that the next choice is drawn from, divided by that of the best list there is. --decay and --discount put one memory in
place of what meta-training chose: the best of them is what the choice has to come near.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.encoder import HashedBagOfWords
from models.episodes import Interactions
from models.figures import interval, user_means
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.ranker import Ranker
from models.replay import honest_residuals, replay_start, states_before
from models.table_fitting import Window
from pipeline.synthetic import Drift, Plan, catalogue, changing_users, draw_events

CHANGE = 60
_SPANS = ((1, 4), (4, 7), (8, 13), (18, 23), (28, 33), (1, 61))


@dataclass(frozen=True)
class Scene:
    """Events in order, those of learnt-from users first; `truth` [judged events, N]; `changing` [U]."""

    events: Interactions
    first: int
    truth: Tensor
    changing: Tensor
    embeddings: Tensor
    ids: tuple[str, ...]


def make_scene(users: int, seed: int) -> Scene:
    """Draw the stream; rows of items are in the order of their ids."""
    drift = Drift(at=CHANGE, share=0.3, own=True)
    plan = Plan(users=users, items=400, choices=100 * users, activity=0.0, arrivals=0.6, seed=seed, drifts=(drift,))
    listed = list(catalogue(plan))
    order = sorted(range(plan.items), key=lambda item: str(listed[item]["item_id"]).encode())
    row_of = {item: row for row, item in enumerate(order)}
    drawn = list(draw_events(plan))
    judged = [one for one in drawn if one.user % 2]
    everything = [one for one in drawn if not one.user % 2] + judged
    users_of, items = torch.tensor([(one.user, row_of[one.item]) for one in everything]).T
    truths = [one.truth[order].astype(np.float32) for one in judged if one.truth is not None]
    events = Interactions(users_of, items, torch.arange(len(items)), torch.ones(len(items)), plan.items)
    embeddings = HashedBagOfWords(256).encode([listed[item]["text"] for item in order])
    ids = tuple(str(listed[item]["item_id"]) for item in order)
    changing = torch.from_numpy(changing_users(plan, drift))
    return Scene(events, len(everything) - len(judged), torch.tensor(np.stack(truths)), changing, embeddings, ids)


def share_of_best(scene: Scene, parameters: MetaParameters) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DCG of the lists over that of the best ones, adapted and start [E], with users and K [E]."""
    tables = assemble_items(parameters, scene.embeddings, torch.arange(scene.events.num_items))
    ranker = Ranker(parameters, tables)
    judged = torch.arange(len(scene.events)) >= scene.first
    replay = replay_start(ranker, scene.events, scene.first, judged, lambda *_: None)
    step, factors = ranker.inner_step, tables.vectors[:, -ranker.state_size :]
    residuals = honest_residuals(replay, factors, step.tau) - step.residual_mean
    deviation = step.deviation(*states_before(replay.users, residuals, step.discount), replay.num_events)
    weight = 1 / torch.log2(torch.arange(10) + 2.0)
    best = (scene.truth.topk(10, 1).values * weight).sum(1)

    def share(logits: Tensor) -> Tensor:
        return (scene.truth.gather(1, logits.topk(10, 1).indices) * weight).sum(1) / best

    adapted = replay.start + deviation @ factors.T if parameters.use_inner_step else replay.start
    return share(adapted), share(replay.start), replay.users, replay.num_events


def report(name: str, scene: Scene, parameters: MetaParameters) -> None:
    """Steady users at K = 61 to 120, and users whose taste has changed, by events since."""
    both = share_of_best(scene, parameters)
    for kind, figures in zip(("adapted", "start"), both[:2], strict=True):
        users, events = both[2:]
        changed = scene.changing[users]
        steady = ~changed & (events > CHANGE) & (events <= 2 * CHANGE)
        row = [f"steady {_shown(figures[steady], users[steady])}"]
        for low, high in _SPANS:
            mine = changed & (events >= CHANGE + low) & (events < CHANGE + high)
            row.append(f"+{low}..{high - 1} {float(figures[mine].mean()):.3f}")
        print(f"{name}, {kind}: {' | '.join(row)}")


def _shown(figures: Tensor, users: Tensor) -> str:
    mean, low, high = interval(user_means(figures, users))
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Meta-train, then print the chosen memory beside single ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=800)
    parser.add_argument("--decay", type=float, action="append", default=[])
    parser.add_argument("--discount", type=float, action="append", default=[])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    scene = make_scene(chosen.users, chosen.seed)
    window = scene.events.select(torch.arange(scene.first))
    parameters, found = meta_train(
        Window(window, scene.embeddings, item_ids=scene.ids, encoder="hashed", seed=chosen.seed)
    )
    print(
        {
            name: found[name]
            for name in (
                "part_decays",
                "memories",
                "gain_of_memories",
                "inner_step",
                "inner_settings",
                "gate",
                "start_set_ndcg",
            )
        }
    )
    report("as meta-trained", scene, parameters)
    for decay in chosen.decay:
        for discount in chosen.discount or [parameters.discount]:
            decays = torch.full_like(parameters.part_decays, decay)
            none = parameters.memory_decays[:0]
            single = replace(parameters, part_decays=decays, memory_decays=none, discount=discount, use_inner_step=True)
            report(f"one memory, decay {decay}, discount {discount}", scene, single)


if __name__ == "__main__":
    main()
