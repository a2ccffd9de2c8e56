"""Part weights on validation users: by the set and the next item, and off where nobody gains."""

import pytest
import torch

from models.part_weights import Sample, set_figures, stream_figures, without_idle_parts

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
