"""Memories of several lengths: one start by what each has lately lost, and one memory alone where mixing is no win."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import memory_tuning, popularity
from models.episodes import History
from models.item_tables import assemble_items
from models.memories import Memories
from models.popularity import priors
from models.ranker import Ranker, TaskBatch
from models.replay import Replay, replay_start, tasks_before
from pipeline.synthetic import Plan
from tests.factories import meta_parameters, synthetic_interactions
from tests.test_gate import ITEMS, PARAMETERS, PRIORS, U, after, make_tasks, only, ranker_with, some_targets

LONG, SHORT = PARAMETERS.part_decays, torch.full((4,), 0.3)


def mixing(**changes: object) -> Ranker:
    return ranker_with(memory_decays=SHORT[None], **changes)


def tasks_with(earned: float, num: int = U) -> TaskBatch:
    """Tasks whose second memory has earned so many nats."""
    return replace(make_tasks(num), track=torch.tensor([[0.0, earned]]).repeat(num, 1))


def test_the_first_memory_is_in_charge_until_another_has_earned_the_caution() -> None:
    memories = Memories(torch.stack([LONG, SHORT]), discount=0.9, rate=2.0, caution=1.0)
    weights = memories.weights(torch.tensor([[0.0], [1.0], [2.0], [40.0], [-40.0]]))
    torch.testing.assert_close(weights[:, 1], torch.sigmoid(torch.tensor([-2.0, 0.0, 2.0, 78.0, -82.0])))
    assert torch.equal(Memories.single(LONG).weights(torch.zeros(3, 0)), torch.ones(3, 1))


def test_a_memory_that_has_earned_everything_is_served_alone() -> None:
    for earned, decays in ((-100.0, LONG), (100.0, SHORT)):
        alone = ranker_with(part_decays=decays)
        torch.testing.assert_close(mixing().logits(tasks_with(earned), PRIORS), alone.logits(make_tasks(), PRIORS))
    torn, single = mixing(memory_caution=0.0), ranker_with()
    assert not torch.allclose(torn.start(tasks_with(0.0), PRIORS), single.start(make_tasks(), PRIORS))


def test_a_mixture_is_served_as_one_vector_and_one_list() -> None:
    ranker, tasks = mixing(memory_caution=0.0), tasks_with(0.1)
    served = ranker.served(tasks, PRIORS)
    logits = served.q @ ranker.items.vectors.T + served.prior_weight[:, None] * PRIORS[tasks.prior_rows]
    logits = torch.nn.functional.pad(logits + tasks.excluded, (0, 1)).scatter_add(1, served.bonus_items, served.bonus)
    torch.testing.assert_close(logits[:, : len(ITEMS)], ranker.logits(tasks, PRIORS)[0], atol=1e-4, rtol=1e-4)


def test_what_a_memory_earns_is_what_the_first_one_has_lost_more() -> None:
    ranker, tasks, targets = mixing(memory_discount=0.5), tasks_with(0.4), some_targets()
    targets[3] = -1
    losses = []
    for decays in (LONG, SHORT):
        # the bonus list is left aside: a ranker without neighbours has none
        none = torch.zeros_like(PARAMETERS.neighbour_values)
        alone = ranker_with(part_decays=decays, neighbour_values=none)
        start = alone.start(replace(make_tasks(), excluded=torch.zeros(U, len(ITEMS))), PRIORS)
        asked = torch.arange(len(ITEMS)) == targets.clamp(min=0)[:, None]
        start = torch.where(asked, start, start + tasks.excluded)
        losses.append(-torch.log_softmax(1.5 * start, 1)[asked].clamp(min=-20.0))
    step = ranker.step(tasks, PRIORS, targets)
    expected = torch.where(targets >= 0, 0.5 * 0.4 + losses[0] - losses[1], 0.4)
    torch.testing.assert_close(step.track[:, 1], expected, atol=1e-4, rtol=1e-4)


def test_several_events_of_a_user_move_the_memories_as_if_they_came_one_by_one() -> None:
    ranker, tasks = mixing(memory_rate=4.0, memory_caution=0.0), tasks_with(0.0, 8)
    order = [0, 4, 4, 4, 7, 4, 7, 4]
    targets = some_targets(len(order), seed=8)
    targets[2] = -1
    together = ranker.step(only(tasks, order), PRIORS, targets, torch.tensor([-1, -1, 1, 2, -1, 3, 4, 5]))
    state = {user: only(tasks, [user]) for user in order}
    for row, user in enumerate(order):
        alone = ranker.step(state[user], PRIORS, targets[[row]])
        for name in ("state", "track", "loss_adapted", "loss_start"):
            torch.testing.assert_close(getattr(together, name)[[row]], getattr(alone, name), atol=1e-5, rtol=1e-5)
        state[user] = after(state[user], alone)
    assert not torch.allclose(together.track[3, 1], together.track[1, 1]), "the case must move"


def test_a_replay_mixes_by_the_tracks_that_the_ranker_leaves_behind_event_by_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything, embeddings, ids = synthetic_interactions(Plan(users=12, items=40, choices=300, sharpness=4.0))
    monkeypatch.setattr(popularity, "POPULARITY_EPOCH", len(everything))  # it stands still
    size = embeddings.shape[1]
    mixed = meta_parameters(ids, text_dim=size, memory_decays=SHORT[None], memory_caution=0.0, pairs_online=False)
    ranker = Ranker(mixed, assemble_items(mixed, embeddings, torch.arange(len(ids))))
    replay = replay_start(ranker, everything, 0, everything.users >= 0, lambda *_: None)
    history, counts, track = History.of(everything.users), priors(mixed.counts), torch.zeros(1, 2)
    events = (everything.users == 3).nonzero()[:, 0]
    assert len(events) > 5
    for event in events.tolist():
        tasks = tasks_before(ranker, everything, history, torch.tensor([event]))
        tasks.track = track
        torch.testing.assert_close(replay.start[[event]], ranker.start(tasks, counts), atol=1e-4, rtol=1e-4)
        track = ranker.step(tasks, counts, everything.items[[event]]).track
    assert bool(track[:, 1] != 0)


def replays_of_tastes(changing: float, *, users: int = 60, events: int = 40) -> list[Replay]:
    """A memory that knows every user's first taste, and one that knows her last; a share of users changes half-way."""
    draw = torch.Generator().manual_seed(0)
    number = torch.arange(users).repeat(events)
    position = torch.arange(events).repeat_interleave(users)
    tastes = torch.randn(2, users, 50, generator=draw) * 2
    changed = number < changing * users
    latest = torch.where(((position >= events // 2) & changed)[:, None], tastes[1][number], tastes[0][number])
    query = torch.multinomial(torch.softmax(latest, 1), 10, generator=draw)
    # what looks at few events is right on the average, and noisy
    noisy = latest + 0.5 * torch.randn(latest.shape, generator=draw)
    columns = query[:, 0], query, number, position, torch.arange(len(number))
    return [Replay(start, *columns) for start in (tastes[0][number], noisy)]


def chosen(replays: list[Replay]) -> memory_tuning.Mixed:
    return memory_tuning.mix(replays, [LONG, SHORT], best=0, seed=0)


def test_memories_are_mixed_where_some_users_change_and_not_where_nobody_does() -> None:
    mixed = chosen(replays_of_tastes(0.3))
    assert len(mixed.memories) == 2
    assert mixed.gain.low > 0
    steady = chosen(replays_of_tastes(0.0))
    assert len(steady.memories) == 1
    assert torch.equal(steady.memories.decays[0], LONG)


def test_the_fields_of_a_version_give_its_memories_back() -> None:
    memories = Memories(torch.stack([LONG, SHORT]), discount=0.8, rate=2.0, caution=0.25)
    again = Memories.of(replace(PARAMETERS, **memories.fields()))
    assert torch.equal(again.decays, memories.decays)
    assert (again.discount, again.rate, again.caution) == (0.8, 2.0, 0.25)


def test_one_memory_keeps_nothing_but_the_gates_track() -> None:
    assert (ranker_with().track_size, mixing().track_size) == (1, 2)
    assert ranker_with().step(make_tasks(), PRIORS, some_targets()).track.shape == (U, 1)
