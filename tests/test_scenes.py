"""New scenes: a version that knows a catalogue's texts only starts from them, and never below popularity alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from models import scene_tuning
from models.figures import interval, user_means
from models.item_tables import assemble_items
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import Ranker
from models.table_fitting import Window
from pipeline.synthetic import Plan
from tests.benchmarks.scenes import Domain, met
from tests.factories import synthetic_interactions
from tests.test_gate import ITEMS, PARAMETERS, PRIORS, U, make_tasks

TEXTS = torch.randn(len(ITEMS), 8, generator=torch.Generator().manual_seed(6))
NEW = torch.full((len(ITEMS),), -1)
PLAN = Plan(users=160, items=120, choices=7000, activity=0.5, arrivals=0.8)
SHARES = torch.linspace(0.0, 0.7, NUM_BUCKETS)


def ranker_over(trained_index: torch.Tensor, shares: torch.Tensor) -> Ranker:
    parameters = replace(PARAMETERS, scene_shares=shares)
    return Ranker(parameters, assemble_items(parameters, TEXTS, trained_index))


def test_in_a_new_scene_the_parts_count_by_their_share_and_popularity_for_the_rest() -> None:
    tasks = make_tasks()
    start, popular, full = (
        ranker_over(NEW, shares).start(tasks, PRIORS)
        for shares in (SHARES, torch.zeros(NUM_BUCKETS), torch.ones(NUM_BUCKETS))
    )
    listed = torch.isfinite(popular)
    torch.testing.assert_close(popular[listed], PRIORS[tasks.prior_rows][listed])
    share = SHARES[bucket_of(tasks.num_events)][:, None]
    assert len(torch.unique(share)) > 1
    torch.testing.assert_close(start[listed], torch.lerp(popular, full, share)[listed], atol=1e-4, rtol=1e-4)


def test_who_has_taken_one_item_that_the_version_knows_is_at_home() -> None:
    tasks, index = make_tasks(), NEW.clone()
    index[tasks.support[0, 3]] = 7
    mixed, full = (ranker_over(index, shares).start(tasks, PRIORS) for shares in (SHARES, torch.ones(NUM_BUCKETS)))
    at_home = (tasks.support == tasks.support[0, 3]).any(1)
    assert torch.equal(mixed[at_home], full[at_home])
    assert not torch.allclose(mixed[~at_home], full[~at_home])
    assert 0 < int(at_home.sum()) < U


def test_nothing_counts_that_does_not_surely_rank_better_than_popularity() -> None:
    draw = torch.Generator().manual_seed(0)
    users = torch.arange(60).repeat(20)
    figures = torch.rand(len(scene_tuning.SHARES), len(users), generator=draw) * 0.2
    figures[1:] = figures[0] - 0.01
    buckets = torch.arange(20).repeat_interleave(60) % 2
    assert not bool(scene_tuning._chosen(figures, users, buckets, 0).by_bucket.any())
    figures[2, buckets == 1] += 0.05
    chosen = scene_tuning._chosen(figures, users, buckets, 0)
    assert chosen.by_bucket[:2].tolist() == [0.0, scene_tuning.SHARES[2]]
    assert chosen.gain.low > 0


@pytest.fixture(scope="module")
def learnt() -> Iterator[MetaParameters]:
    """A version that validation users have told how far it may be trusted; one thread, for a busy neighbour's sake."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    events, texts, ids = synthetic_interactions(PLAN)
    yield meta_train(Window(events, texts, item_ids=ids, encoder="hashed"))[0]
    torch.set_num_threads(before)


def test_a_young_scene_of_known_words_is_surely_better_than_popularity(learnt: MetaParameters) -> None:
    """Many come before popularity has much to go by; later on it is as good there (LOG.md, "New scenes")."""
    replay, figures = met(learnt, Domain(*synthetic_interactions(replace(PLAN, seed=7, users=400, choices=2000))))
    assert interval(user_means(figures.start - figures.popular, replay.users)).low > 0


@pytest.mark.parametrize("words", ["the same", "never read"])
def test_a_new_scene_is_no_worse_than_popularity_that_moves_at_once(words: str, learnt: MetaParameters) -> None:
    assert float(learnt.scene_shares.max()) > 0
    new = Domain(*synthetic_interactions(replace(PLAN, seed=7, users=120, choices=5000)))
    if words == "never read":  # other columns of the hashed words: what the version reads means nothing
        new = new._replace(embeddings=new.embeddings.flip(1))
    replay, figures = met(learnt, new)
    gain, buckets = figures.start - figures.popular, bucket_of(replay.num_events)
    assert interval(user_means(gain, replay.users)).high >= 0
    for bucket in torch.unique(buckets).tolist():
        mine = buckets == bucket
        assert interval(user_means(gain[mine], replay.users[mine])).high >= 0
