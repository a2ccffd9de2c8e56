"""Part weights on validation users: by the set and the next item, and off where nobody gains."""

import pytest
import torch

from models import part_weights
from models.part_weights import Sample, set_figures, stream_figures, where_parts_pay, without_idle_parts

E, C, Q = 60, 30, 3


def sample() -> Sample:
    """Popularity says nothing, part 1 finds the query, part 2 buries it."""
    draw = torch.Generator().manual_seed(0)
    scored = torch.zeros(E, 4, C + Q)
    scored[:, 0] = torch.randn(E, C + Q, generator=draw) * 0.1
    scored[:, 1, C:] = 2 + torch.arange(Q, 0, -1.0)
    scored[:, 2, C:] = -2.0
    query = torch.arange(Q).expand(E, -1)
    return Sample(scored, query, torch.arange(E) % 12, torch.full((E,), 2))


def test_the_very_next_item_counts_as_much_as_the_set() -> None:
    found = sample()
    turned = found.scored.clone()
    turned[:, 1, C:] = turned[:, 1, C:].flip(1)
    weights = torch.tensor([0.0, 1.0, 0.0]).expand(E, -1)
    assert torch.equal(set_figures(turned, found.query, weights), set_figures(found.scored, found.query, weights))
    assert float(stream_figures(found.scored, found.query, weights).mean()) == pytest.approx(1.0)
    assert float(stream_figures(turned, found.query, weights).mean()) == pytest.approx(0.75)


def test_a_part_that_users_do_not_gain_from_is_off() -> None:
    weights, off = without_idle_parts(sample(), torch.full((8, 3), 1 / 3))
    assert off == [2]
    assert (weights[:, 2] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(8))


def test_a_bucket_that_had_parts_only_ranks_by_popularity_once_they_are_off() -> None:
    weights = torch.full((8, 3), 1 / 3)
    weights[7] = torch.tensor([0.0, 0.0, 1.0])
    assert without_idle_parts(sample(), weights)[0][7].tolist() == [1.0, 0.0, 0.0]


WEIGHTS = torch.tensor([0.5, 0.4, 0.1]).repeat(8, 1)
ALONE = [1.0, 0.0, 0.0]


def kept(*gained: tuple[int, float, float]) -> list[bool]:
    """In which buckets parts are on, by the buckets' mean gains and their spread over twenty users."""
    buckets = torch.tensor([bucket for bucket, *_ in gained]).repeat_interleave(20)
    deviations = torch.linspace(-1, 1, 20)
    gains = torch.cat([mean + spread * deviations for _, mean, spread in gained])
    none = torch.zeros(len(buckets), 0)
    found = where_parts_pay(Sample(none, none, torch.arange(len(buckets)) % 20, buckets), WEIGHTS, gains)
    assert all(row.tolist() in (WEIGHTS[0].tolist(), ALONE) for row in found)
    return [row.tolist() != ALONE for row in found]


def test_where_users_surely_gain_parts_are_off_in_buckets_that_surely_lose() -> None:
    gained = (1, 0.1, 0.01), (2, -0.001, 0.09), (3, -0.01, 0.01)
    assert kept(*gained) == [True, True, True, False, True, True, True, True]


def test_a_bucket_that_differs_by_little_is_judged_with_the_others() -> None:
    """Two standard errors are chance among seven buckets, four are not (twenty users err by .14 of their spread)."""
    assert kept((1, 0.1, 0.01), (2, -0.01, 0.037), (3, -0.01, 0.018)) == [True, True, True, False, *4 * [True]]


def test_where_they_do_not_surely_gain_parts_are_on_in_buckets_that_surely_do() -> None:
    assert kept((1, -0.1, 0.01), (2, 0.001, 0.9), (3, 0.02, 0.01)) == [True, *2 * [False], True, *4 * [False]]


def test_what_lists_gain_without_a_support_decides_nothing() -> None:
    assert not any(kept((0, 0.5, 0.1), (2, 0.0, 0.1))[1:])


def test_one_season_does_not_switch_parts_off_that_pay_before_it() -> None:
    """Part 1 buries the query in the season and finds it before; part 2 buries it in both."""
    before, season = sample(), sample()
    season.scored[:, 1, C:] = -1.0 - torch.rand(E, Q, generator=torch.Generator().manual_seed(1))
    initial = torch.tensor([0.6, 0.3, 0.1]).repeat(8, 1)
    elsewhere = season._replace(users=season.users + 100)

    def off(later: Sample, earlier: Sample) -> tuple[str, ...]:
        return part_weights.weigh(initial, ("first", "second"), later, earlier, lambda _n, _of: None, seed=0).parts_off

    assert off(season, before._replace(users=before.users + 100)) == ("second",)
    assert off(season, elsewhere) == ("first", "second")
    nothing = Sample(*(column[:0] for column in season))
    assert off(season, nothing) == ("first", "second")
    assert off(nothing, before) == ()


def test_parts_are_judged_by_users_who_did_not_choose_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[set[int]]()

    def searched(chosen: Sample, initial: torch.Tensor, progress: object) -> torch.Tensor:
        asked.append(set(chosen.users.tolist()))
        return torch.tensor([0.0, float(len(asked) == 1), float(len(asked) == 2)]).repeat(8, 1)

    monkeypatch.setattr(part_weights, "_searched", searched)
    found = sample()
    gains = part_weights.gains_of_parts(found, WEIGHTS, seed=0)
    assert asked[0] | asked[1] == set(range(12))
    assert not asked[0] & asked[1]
    first = torch.tensor([user in asked[0] for user in found.users.tolist()])
    # what the first half chose finds the query, and is judged by the second; what the second chose buries it
    assert bool((gains[~first] > 0).all())
    assert bool((gains[first] <= 0).all())
