"""The half-life of popularity, chosen on users who come later."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.episodes import Interactions
from models.popularity_tuning import HALF_LIVES, Tuned, tune
from models.validation_users import split

NUM_ITEMS, USERS, EVENTS = 300, 1500, 8
USUAL = 4_000.0


def shop(*, every: int, sharpness: float = 1.0, seed: int = 0) -> Interactions:
    """Users come one after the other and take items of a law that is drawn anew after `every` events."""
    draw = torch.Generator().manual_seed(seed)
    items = []
    for user in range(USERS):
        if user * EVENTS % every < EVENTS:
            chance = torch.arange(1.0, NUM_ITEMS + 1)[torch.randperm(NUM_ITEMS, generator=draw)] ** -sharpness
        items.append(torch.multinomial(chance, EVENTS, generator=draw))
    num = USERS * EVENTS
    return Interactions(
        torch.arange(USERS).repeat_interleave(EVENTS), torch.cat(items), torch.arange(num), torch.ones(num), NUM_ITEMS
    )


def tuned(interactions: Interactions, before: float = USUAL, *, recommend_seen: bool = False) -> Tuned:
    cut, unseen = split(interactions)
    told = list[tuple[int, int]]()
    found = tune(
        interactions,
        cut,
        unseen,
        before,
        recommend_seen=recommend_seen,
        seed=0,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]
    return found


def test_where_popularity_stays_it_is_counted_long_and_where_it_changes_short() -> None:
    stays, changes = tuned(shop(every=10**9), 200.0), tuned(shop(every=3_000))
    assert stays.half_life > 1_000.0
    assert changes.half_life == 1_000.0
    assert stays.gain.low > 0
    assert changes.gain.low > 0


@pytest.mark.parametrize("before", [USUAL, 700.0])
def test_where_nothing_is_popular_chance_does_not_choose(before: float) -> None:
    found = tuned(shop(every=10**9, sharpness=0.0), before)
    assert found == Tuned(before, found.gain)
    assert found.gain.mean == 0


def test_what_was_had_is_ranked_where_people_take_things_again() -> None:
    interactions = shop(every=3_000)
    twice = interactions.items.where(torch.arange(len(interactions)) % 2 == 0, interactions.items.roll(1))
    again = replace(interactions, items=twice)
    listed, not_listed = tuned(again, recommend_seen=True).gain, tuned(again).gain
    assert listed.mean > 1.3 * not_listed.mean, "half of the events are found only where what was had is ranked"


def test_one_user_or_none_decide_nothing() -> None:
    interactions = shop(every=3_000).select(torch.arange(2 * EVENTS))
    for unseen in (interactions.users == 1, torch.zeros(2 * EVENTS, dtype=torch.bool)):
        found = tune(
            interactions, EVENTS, unseen, USUAL, recommend_seen=False, seed=0, progress=lambda _done, _total: None
        )
        assert found == Tuned(USUAL, found.gain)


def test_the_half_lives_that_are_tried_hold_the_usual_one() -> None:
    assert USUAL in HALF_LIVES
