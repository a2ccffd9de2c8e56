"""Biases of items: what is taken more often than the start expects, judged by users that they are not from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.episodes import History, following
from models.item_biases import SHARES, of_items, tune
from models.item_tables import assemble_items
from models.ranker import Ranker, TaskBatch
from models.replay import QUERY, Replay
from tests.factories import meta_parameters

N, USERS, EVENTS = 40, 60, 30


def replay_of(misjudged: Tensor, *, seed: int = 0) -> Replay:
    """Users choose by softmax(start + misjudged), misjudged [N]: what the start does not know."""
    draw = torch.Generator().manual_seed(seed)
    users = torch.arange(USERS).repeat_interleave(EVENTS)
    start = torch.randn(len(users), N, generator=draw)
    targets = torch.multinomial(torch.softmax(start + misjudged, 1), 1, generator=draw)[:, 0]
    history = History.of(users)
    query = following(history, targets, torch.arange(len(users)), QUERY)
    return Replay(start, targets, query, users, history.position, torch.arange(len(users)))


def test_what_the_start_misjudges_is_found_with_its_sign() -> None:
    misjudged = torch.linspace(-2.0, 2.0, N)
    found = tune(replay_of(misjudged), seed=0)
    assert found.gain.low > 0
    assert float(torch.corrcoef(torch.stack([found.by_item, misjudged]))[0, 1]) > 0.95


def test_there_are_none_where_the_start_is_right() -> None:
    """One seed in six may take chance for a gain, and finds little; these do not."""
    for seed in (1, 2, 3):
        assert not tune(replay_of(torch.zeros(N), seed=seed), seed=seed).by_item.any()


def test_a_bias_is_what_is_taken_over_what_is_expected() -> None:
    """First events, which have no support, count for nothing."""
    replay = replay_of(torch.linspace(-2.0, 2.0, N))
    found, later = tune(replay, seed=0).by_item, replay.select(replay.num_events > 0)
    taken, expected = torch.bincount(later.targets, minlength=N).float(), torch.softmax(later.start, 1).sum(0)
    misjudged = ((taken + 20) / (expected + 20)).log()
    share = float(found @ misjudged / misjudged.square().sum())
    torch.testing.assert_close(found, share * misjudged)
    assert round(share, 4) in SHARES


def test_biases_go_with_ids() -> None:
    assert of_items(torch.tensor([1.0, 2.0]), ("a", "c"), ("b", "c", "d")).tolist() == [0.0, 2.0, 0.0]


def test_they_hold_with_a_support_for_items_that_the_version_knows_and_not_in_single_parts() -> None:
    plain = meta_parameters([f"i{row:02d}" for row in range(N)])
    biased, index = replace(plain, item_bias=torch.linspace(-1.0, 1.0, N)), torch.tensor([*range(N), -1])
    texts = torch.zeros(N + 1, plain.text_map.shape[0] - 1)
    rankers = [Ranker(one, assemble_items(one, texts, index)) for one in (plain, biased)]
    support = torch.full((16, 10), -1)
    support[1::2, -1] = 3
    tasks = TaskBatch(
        support=support,
        weights=torch.ones(16, 10),
        num_events=(support >= 0).sum(1),
        state=torch.zeros(16, rankers[0].state_size),
        state_events=torch.zeros(16, dtype=torch.int64),
        track=torch.zeros(16, 1),
        excluded=torch.zeros(16, N + 1),
        prior_rows=torch.zeros(16, dtype=torch.int64),
    )
    priors = torch.randn(8, N + 1, generator=torch.Generator().manual_seed(1))
    change = rankers[1].start(tasks, priors) - rankers[0].start(tasks, priors)
    differs = change.abs() > 1e-6
    assert not differs[::2].any()
    assert differs[1::2, :N].float().mean() > 0.9
    assert torch.equal(rankers[0].parts(tasks, priors), rankers[1].parts(tasks, priors))
