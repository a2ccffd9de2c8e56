"""How long the start remembers is chosen by validation users, on any data set."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.episodes import Interactions
from models.item_tables import assemble_items
from models.outer_loop import meta_train
from models.ranker import Ranker
from models.recipe import DEFAULT
from models.replay import replay_side_by_side, replay_start
from models.table_fitting import Window
from pipeline.synthetic import Plan
from tests.factories import meta_parameters, synthetic_interactions

# 50 validation users; with half as many their choice is chance
STEADY = Plan(users=200, items=60, choices=7000, activity=0.0, arrivals=0.8, sharpness=4.0)


def chosen_decays(interactions: Interactions, embeddings: torch.Tensor, ids: tuple[str, ...]) -> list[float]:
    parameters, _ = meta_train(Window(interactions, embeddings, item_ids=ids, encoder="hashed", seed=0))
    return [round(decay, 3) for decay in parameters.part_decays.tolist()]


def test_steady_tastes_are_remembered_longer() -> None:
    decays = chosen_decays(*synthetic_interactions(STEADY))
    assert all(chosen > default + 1e-3 for chosen, default in zip(decays, DEFAULT.decays.tolist(), strict=True))


def test_users_who_only_follow_their_last_item_are_not() -> None:
    everything, embeddings, ids = synthetic_interactions(STEADY)
    draw = torch.Generator().manual_seed(0)
    items, last = everything.items.clone(), dict[int, int]()
    # every item has one of three successors, whatever came before
    successors = torch.randint(0, everything.num_items, (everything.num_items, 3), generator=draw)
    for event, user in enumerate(everything.users.tolist()):
        if user in last:
            items[event] = successors[last[user], torch.randint(3, (1,), generator=draw)]
        last[user] = int(items[event])
    decays = chosen_decays(replace(everything, items=items), embeddings, ids)
    assert all(chosen <= default + 1e-3 for chosen, default in zip(decays, DEFAULT.decays.tolist(), strict=True))


def test_one_replay_of_several_lengths_is_each_of_them_replayed_alone() -> None:
    everything, embeddings, ids = synthetic_interactions(STEADY)
    parameters = meta_parameters(ids, text_dim=embeddings.shape[1])
    tables = assemble_items(parameters, embeddings, torch.arange(len(ids)))
    lengths = (torch.full((4,), decay) for decay in (1.0, 0.9, 0.5))
    rankers = [Ranker(replace(parameters, part_decays=decays), tables) for decays in lengths]
    first, chosen = 1500, everything.users % 3 == 0
    together = replay_side_by_side(rankers, everything, first, chosen, lambda *_: None)
    for ranker, replay in zip(rankers, together, strict=True):
        alone = replay_start(Ranker(ranker.parameters, tables), everything, first, chosen, lambda *_: None)
        assert all(torch.equal(column, getattr(alone, name)) for name, column in vars(replay).items())
    assert not torch.equal(together[0].start, together[1].start)
