"""Weights for later events: chosen on users of the fit part, and nothing else of the parameters changes."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from models import later_horizon
from models.episodes import Interactions
from models.later_horizon import ASKED_BUCKET, for_later_events
from models.meta_parameters import MetaParameters
from tests.factories import meta_parameters

NUM_ITEMS = 60


def two_stages(num_users: int) -> Interactions:
    """Everybody takes the first thirty items first, in any order, and the others later."""
    draw = torch.Generator().manual_seed(0)
    first = torch.stack([torch.randperm(30, generator=draw)[:20] for _ in range(num_users)])
    later = torch.stack([30 + torch.randperm(30, generator=draw)[:15] for _ in range(num_users)])
    items = torch.cat([first, later], 1)
    users = torch.arange(num_users).repeat_interleave(items.shape[1])
    # users begin one after the other and overlap
    times = (torch.arange(num_users)[:, None] * 10 + torch.arange(items.shape[1])).flatten()
    order = torch.argsort(times, stable=True)
    return Interactions(users[order], items.flatten()[order], times[order], torch.ones(len(order)), NUM_ITEMS)


IDS = [f"item-{number:03}" for number in range(NUM_ITEMS)]


def test_what_is_taken_later_is_what_the_prior_knows_and_nothing_but_weights_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(later_horizon, "LEAST_EXAMPLES", 20)
    monkeypatch.setattr(later_horizon, "DECAYS", later_horizon.DECAYS[:1])
    torch.set_num_threads(1)
    interactions = two_stages(24)
    usual = meta_parameters(IDS)
    later = for_later_events(usual, interactions, seed=0, progress=lambda *_: None)
    assert (later.counts[0, 30:].min() > later.counts[0, :30].max()).item(), "the later stage is what is asked for"
    assert later.part_weights[1:ASKED_BUCKET, 0].min() > 0.3, "there is nothing but popularity to go by"
    assert later.part_weights.sum(1).tolist() == pytest.approx([1.0] * len(later.part_weights), abs=1e-5)
    changed = {"counts", "part_weights", "part_decays"}
    for field in fields(MetaParameters):
        one, other = getattr(usual, field.name), getattr(later, field.name)
        if field.name not in changed:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_parameters_stay_as_they_are_where_few_users_have_long_histories() -> None:
    interactions = two_stages(12)
    usual = meta_parameters(IDS)
    assert for_later_events(usual, interactions, seed=0, progress=lambda *_: None) is usual
