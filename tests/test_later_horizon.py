"""The model for later events: fitted and chosen on users of the fit part; only the start is another."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from models import later_horizon, learnt_part
from models.episodes import Interactions
from models.later_horizon import ASKED_BUCKET, REPLACED, for_later_events
from models.later_step import adapted_and_start
from models.meta_parameters import MetaParameters
from tests.factories import meta_parameters

NUM_ITEMS = 120
IDS = [f"item-{number:03}" for number in range(NUM_ITEMS)]
TEXTS = torch.zeros(NUM_ITEMS, 16)


def two_stages(num_users: int) -> Interactions:
    """Everybody takes twenty of the first sixty items first and fifteen others later: odd users odd ones, even even."""
    draw = torch.Generator().manual_seed(0)

    def some(user: int, num: int) -> torch.Tensor:
        return 2 * torch.randperm(30, generator=draw)[:num] + user % 2

    items = torch.stack([torch.cat([some(user, 20), 60 + some(user, 15)]) for user in range(num_users)])
    users = torch.arange(num_users).repeat_interleave(items.shape[1])
    # users begin one after the other and overlap
    times = (torch.arange(num_users)[:, None] * 10 + torch.arange(items.shape[1])).flatten()
    order = torch.argsort(times, stable=True)
    return Interactions(users[order], items.flatten()[order], times[order], torch.ones(len(order)), NUM_ITEMS)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later_horizon, "LEAST_EXAMPLES", 20)
    monkeypatch.setattr(later_horizon, "_STARTS", later_horizon._STARTS[2:4])
    monkeypatch.setattr(later_horizon, "_REFINEMENTS", 1)
    monkeypatch.setattr(learnt_part, "STEPS", 120)
    monkeypatch.setattr(later_horizon, "DECAYS", later_horizon.DECAYS[:1])
    torch.set_num_threads(1)


def asked(usual: MetaParameters, interactions: Interactions) -> MetaParameters:
    return for_later_events(usual, interactions, TEXTS, seed=0, progress=lambda *_: None)


def test_what_is_taken_later_is_what_the_prior_knows_and_only_the_start_changes() -> None:
    usual = meta_parameters(IDS)
    later = asked(usual, two_stages(24))
    assert later.counts[0, 60:].mean() > 1.5 * later.counts[0, :60].mean(), "the later stage is what is asked for"
    assert later.part_weights.sum(1).tolist() == pytest.approx([1.0] * len(later.part_weights), abs=1e-5)
    assert later.part_weights[ASKED_BUCKET:].equal(usual.part_weights[ASKED_BUCKET:]), "nobody asks at such K"
    assert later.parts[REPLACED] == "later"
    assert not later.pairs_online, "what is learnt cannot be counted on"
    start = {"counts", "part_weights", "part_decays", "parts", "text_map", "use_inner_step"}
    tables = {"item_out", "item_in", "item_spread", "neighbour_items", "neighbour_values"}
    tables |= {
        "pairs_online",
        "pair_counts",
        "pair_means",
        "pair_worth",
        "memory_decays",
        "context_map",
        "pace_direction",
        "usual_pace",
        "item_bias",
    }
    for field in fields(MetaParameters):
        one, other = getattr(usual, field.name), getattr(later, field.name)
        if field.name not in start | tables:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_the_model_for_later_events_ranks_them_better_than_the_one_for_the_next() -> None:
    interactions, usual = two_stages(60), replace(meta_parameters(IDS), use_inner_step=False)
    users = torch.arange(50, 60)
    fit = interactions.select(~torch.isin(interactions.users, users))
    rows = torch.stack([interactions.items[interactions.users == user] for user in users])
    figures = [
        float(adapted_and_start(parameters, TEXTS, rows[:, :20], rows[:, 20:], (10, 20))[1].mean())
        for parameters in (usual, asked(usual, fit))
    ]
    assert figures[1] > figures[0] + 0.1
    assert figures[1] > 0.45, "half of the later items of one's own kind are taken: nobody can know which"


def test_adaptation_that_does_not_rank_later_events_better_is_off() -> None:
    usual = replace(meta_parameters(IDS), use_inner_step=True, step_from=1, trust_radius=5.0)
    assert not asked(usual, two_stages(24)).use_inner_step, "random factors teach nothing"


def test_parameters_stay_as_they_are_where_few_users_have_long_histories() -> None:
    usual = meta_parameters(IDS)
    assert asked(usual, two_stages(12)) is usual


def test_adapted_and_start_are_the_same_before_the_step_begins_and_not_after() -> None:
    usual = replace(meta_parameters(IDS), use_inner_step=True, step_from=3, gate_credit=1e6)
    rows = torch.stack([torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(u))[:40] for u in range(9)])
    head, query = rows[:, :20], rows[:, 20:]
    early = adapted_and_start(usual, TEXTS, head, query, (1, 2))
    late = adapted_and_start(usual, TEXTS, head, query, (20,))
    assert early[0].equal(early[1])
    assert not late[0].equal(late[1])
    never = adapted_and_start(replace(usual, use_inner_step=False), TEXTS, head, query, (20,))
    assert never[0].equal(never[1])
    assert never[1].allclose(late[1]), "the start knows nothing of adaptation"


def test_the_learnt_part_finds_which_items_follow_which_and_is_the_same_for_the_same_seed() -> None:
    state = torch.random.get_rng_state()
    matrix, again = (learnt_part.learnt_part(two_stages(60), TEXTS, seed=3) for _ in range(2))
    assert matrix.equal(again)
    assert torch.random.get_rng_state().equal(state), "nobody else's draws are touched"
    assert after_same_kind(matrix, slice(0, 60)) > 0.1, "odd items follow odd ones"


def test_a_cold_item_stands_in_the_learnt_part_by_its_text() -> None:
    texts = torch.eye(2).repeat(NUM_ITEMS // 2, 1)  # odd and even
    interactions = two_stages(60)
    matrix = learnt_part.learnt_part(interactions.select(interactions.items != 7), texts, seed=0)
    assert after_same_kind(matrix, slice(7, 8)) > 0.1


def after_same_kind(matrix: torch.Tensor, rows: slice) -> float:
    """How much more the items had give to later items of their own kind than to the others."""
    same = (torch.arange(NUM_ITEMS)[rows, None] - torch.arange(60, NUM_ITEMS)) % 2 == 0
    later = matrix[rows, 60:]
    return float(later[same].mean() - later[~same].mean())
