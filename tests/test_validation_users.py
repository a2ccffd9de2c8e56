"""Which validation users decide: as many as memory allows, in part where a catalogue is large or histories are long."""

import pytest
import torch
from torch import Tensor

from models.episodes import Interactions
from models.figures import judged_by_halves, standard_error, surely_gain
from models.validation_users import LEAST_USERS, limited

ITEMS = 10


def events_of(*lengths: int) -> Interactions:
    """Users with so many events each, in turn as long as they have any."""
    turns = torch.cat([torch.arange(length) for length in lengths])
    users = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[
        torch.argsort(turns, stable=True)
    ]
    num = len(users)
    return Interactions(users, torch.zeros(num, dtype=torch.int64), torch.arange(num), torch.ones(num), ITEMS)


def kept(events: Interactions, most: int) -> Tensor:
    """Events kept of each user."""
    mask = limited(events, torch.ones(len(events), dtype=torch.bool), 0, most * ITEMS)
    return torch.bincount(events.users[mask], minlength=int(events.users.max()) + 1)


def test_users_are_whole_where_enough_of_them_fit() -> None:
    counts = kept(events_of(*[8] * 60), 8 * LEAST_USERS + 7)
    assert counts.sum() == 8 * LEAST_USERS
    assert set(counts.tolist()) == {0, 8}


def test_more_than_a_few_decide_where_histories_are_long() -> None:
    lengths = [3] * 10 + [500] * 90
    counts = kept(events_of(*lengths), 400)
    assert (counts > 0).sum() == LEAST_USERS
    assert 400 - LEAST_USERS < counts.sum() <= 400, "memory is used, and not exceeded"
    long = counts[counts > 3]
    assert len(set(long.tolist())) == 1, "those with long histories have equal parts"


def test_everybody_has_a_part_where_there_are_few_or_no_room() -> None:
    assert kept(events_of(50, 2, 50), 20).tolist() == [9, 2, 9]
    assert kept(events_of(50, 50), 1).tolist() == [1, 1]
    assert kept(events_of(50, 50), 100).tolist() == [50, 50]


def test_of_a_user_the_first_events_are_kept() -> None:
    events = events_of(50, 50)
    mask = limited(events, torch.arange(len(events)) >= 10, 0, 20 * ITEMS)
    assert mask.nonzero()[:, 0].tolist() == list(range(10, 30))


@pytest.mark.parametrize("users", [0, 1])
def test_one_user_has_no_spread_to_tell_chance_by(users: int) -> None:
    gains = torch.ones(3, users)
    assert standard_error(gains).tolist() == [torch.inf] * 3
    assert not surely_gain(gains[0])


def test_of_three_users_halves_of_one_and_two_choose_without_a_warning() -> None:
    gains = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    judged, chosen = judged_by_halves(gains, 0)
    assert chosen == 1
    assert sorted(judged.tolist()) == [0.0, 0.0, 1.0], "the two are judged by the one, who decides nothing"
