"""Peers against what their formulae give, worked out the slow way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.episodes import Interactions
from models.peers import peer as peers
from models.peers.als import FoldedALS
from models.peers.item_items import Ease, ItemKNN
from models.peers.mixed import Examples, choose, fit_mixed
from models.peers.peer import Known
from models.peers.popularity import Popular, PositionPopular, Repeats
from models.peers.sasrec import SASRec

NUM_ITEMS = 8
SEQUENCES = [[0, 1, 2, 3], [0, 1, 4], [1, 2, 5], [2, 3, 4, 0], [5, 6], [0, 2]]


def interactions(sequences: list[list[int]]) -> Interactions:
    """Events in turns: every user's first, then every user's second."""
    rows = sorted((place, user, item) for user, row in enumerate(sequences) for place, item in enumerate(row))
    users, items = (torch.tensor([row[at] for row in rows]) for at in (1, 2))
    return Interactions(users, items, torch.arange(len(rows)), torch.ones(len(rows)), NUM_ITEMS)


def known(*histories: list[int]) -> Known:
    width = max(map(len, histories))
    padded = [[-1] * (width - len(row)) + row for row in histories]
    return Known(torch.tensor(padded).view(len(histories), width), torch.tensor([len(row) for row in histories]))


@pytest.mark.parametrize("added", [0, 1000], ids=["row by row", "as a product"])
def test_what_items_say_of_one_another_is_summed_over_what_was_had(added: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_ADDED", added)
    table = torch.randn(NUM_ITEMS, NUM_ITEMS, generator=torch.Generator().manual_seed(0))
    asked = known([], [3], [1, 2, 1], [0, 4, 2, 3])
    wanted = asked.weighted(NUM_ITEMS, 0.9) @ table
    torch.testing.assert_close(asked.summed(lambda had: table[had], 0.9), wanted)


def test_of_users_without_events_neighbours_say_nothing() -> None:
    peer = ItemKNN(interactions(SEQUENCES), shrink=5.0, decay=0.9)
    assert (
        peer.scores(Known(torch.full((2, 1), -1), torch.zeros(2, dtype=torch.int64))).tolist()
        == [[0.0] * NUM_ITEMS] * 2
    )


def test_histories_are_weighted_by_age_the_newest_counting_one() -> None:
    found = known([3, 1, 3], [2]).weighted(NUM_ITEMS, 0.5)
    assert found[0].tolist() == [0, 0.5, 0, 1.25, 0, 0, 0, 0]
    assert found[1].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_popularity_counts_on_only_where_it_is_online() -> None:
    fitted = interactions(SEQUENCES)
    online, fixed = Popular(fitted, online=True), Popular(fitted, online=False)
    for peer in (online, fixed):
        peer.learn(known([0], [1]), torch.tensor([7, 7]))
    assert fixed.scores(known([0]))[0].tolist() == [4, 3, 4, 2, 2, 2, 1, 0]
    assert online.scores(known([0]))[0].tolist() == [4, 3, 4, 2, 2, 2, 1, 2]


def test_popularity_by_position_prefers_what_people_take_first() -> None:
    peer = PositionPopular(interactions(SEQUENCES), online=True, half_life=4000.0)
    first, later = peer.scores(Known(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 3])))
    assert int(first.argmax()) == 0, "half of the users began with it"
    assert int(later.argmax()) in (0, 3), "what the two long histories end with"
    floor = PositionPopular(interactions(SEQUENCES), online=True, half_life=4000.0, least_events=3)
    assert torch.equal(floor.scores(known([]))[0], later)


def slow_cosine(sequences: list[list[int]], history: list[int], shrink: float, decay: float) -> list[float]:
    had = np.zeros((len(sequences), NUM_ITEMS))
    for user, row in enumerate(sequences):
        had[user, row] = 1
    both, events = had.T @ had, had.sum(0)
    scores = np.zeros(NUM_ITEMS)
    for age, item in enumerate(reversed(history)):
        for other in range(NUM_ITEMS):
            if other != item:
                scores[other] += decay**age * both[item, other] / (np.sqrt(events[item] * events[other]) + shrink)
    found: list[float] = scores.tolist()
    return found


def test_item_knn_learning_online_equals_item_knn_fitted_on_everything() -> None:
    peer = ItemKNN(interactions(SEQUENCES[:3]), shrink=5.0, decay=0.9)
    for row in SEQUENCES[3:]:
        for place, item in enumerate(row):
            peer.learn(known(row[:place]), torch.tensor([item]))
    peer.learn(known([1, 2, 3]), torch.tensor([2]))  # taken again: counts nothing
    history = [1, 4, 5]
    expected = slow_cosine(SEQUENCES, history, 5.0, 0.9)
    assert peer.scores(known(history))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_ease_minimises_its_objective_with_a_zero_diagonal() -> None:
    fitted = interactions(SEQUENCES)
    weights = Ease(fitted, ridge=2.0, decay=1.0).scores(known(*[[item] for item in range(NUM_ITEMS)]))
    had = torch.zeros(len(SEQUENCES), NUM_ITEMS)
    for user, row in enumerate(SEQUENCES):
        had[user, row] = 1
    gradient = had.T @ (had @ weights - had) + 2.0 * weights
    assert weights.diagonal().abs().max() < 1e-6
    off = ~torch.eye(NUM_ITEMS, dtype=torch.bool)
    assert gradient[off].abs().max() < 1e-4


def test_a_user_folded_in_without_decay_is_the_librarys_own() -> None:
    from implicit.cpu.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix
    from threadpoolctl import threadpool_limits

    peer = FoldedALS(interactions(SEQUENCES), ridge=2.0, alpha=4.0, decay=1.0)
    with threadpool_limits(1, "blas"):
        library = AlternatingLeastSquares(factors=64, regularization=2.0, alpha=4.0, num_threads=1)
        library.item_factors = peer.items.numpy()
        rows = csr_matrix((np.ones(3), ([0, 0, 0], [1, 4, 5])), shape=(1, NUM_ITEMS))
        expected = library.recalculate_user(np.array([0]), rows)
    assert np.allclose(peer.users(known([1, 4, 5])).numpy(), expected, atol=1e-3)


def test_repeats_rank_the_users_own_items_by_age() -> None:
    scores = Repeats(interactions(SEQUENCES), decay=0.5).scores(known([2, 6, 6]))
    assert scores[0].argsort(descending=True)[:2].tolist() == [6, 2]


def test_a_sequence_model_learns_what_follows_what() -> None:
    draw = np.random.default_rng(0)
    # after item i comes i + 1, from a random first item on
    rows = [[(int(first) + step) % NUM_ITEMS for step in range(6)] for first in draw.integers(0, NUM_ITEMS, 60)]
    torch.set_num_threads(1)
    peer = SASRec(interactions(rows), seed=0, steps=150)
    scores = peer.scores(known([0, 1, 2], [5, 6]))
    assert scores.argmax(1).tolist() == [3, 7]
    assert torch.allclose(peer.scores(known([5, 6]))[0], scores[1], atol=1e-5), "padding changes nothing"
    assert torch.isfinite(peer.scores(known([], [3]))).all()


class Constant:
    """A peer that always says the same."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores

    def scores(self, asked: Known) -> Tensor:
        return self._scores.expand(len(asked.num_events), -1)

    def learn(self, asked: Known, items: Tensor) -> None:
        return


def test_validation_chooses_the_better_setting_and_trusts_the_prior_where_the_peer_is_wrong() -> None:
    num_items, right, wrong = 40, torch.zeros(40), torch.zeros(40)
    right[30:], wrong[:10] = torch.arange(10.0) + 1, 1.0
    asked = Known(torch.full((80, 1), -1), torch.tensor([0, 4]).repeat(40))
    query = torch.arange(30, 40).expand(80, -1)
    examples = Examples(asked, query, torch.zeros(80, num_items, dtype=torch.bool))
    choice = choose(lambda good: Constant(right if good else wrong), [False, True], Constant(wrong), examples)
    assert choice.setting is True
    assert choice.figure == pytest.approx(1.0)
    mixed, worst = fit_mixed(
        lambda _window, _setting: Constant(wrong),
        lambda _window: Constant(right),
        (interactions(SEQUENCES), interactions(SEQUENCES)),
        [None],
        examples,
    )
    assert worst.weights[0] > 0.5
    assert mixed.scores(asked).argmax(1).min() >= 30
