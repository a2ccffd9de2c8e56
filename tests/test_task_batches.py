"""Rows of a call of the ranker stand alone, to the bit: a batch may be cut anywhere."""

from __future__ import annotations

import pytest
import torch

from models.popularity import NUM_BUCKETS
from models.ranker import Ranker, TaskBatch
from pipeline.task_batches import CHUNK_SIZES, largest_chunk
from tests.benchmarks.scene import SUPPORT_SIZE, catalogue, one_thread, parameters


def drawn_tasks(ranker: Ranker, num_users: int) -> TaskBatch:
    """Users with supports of every length, some items excluded."""
    draw, num_items = torch.Generator().manual_seed(1), ranker.items.num_items
    support = torch.randint(0, num_items, (num_users, SUPPORT_SIZE), generator=draw)
    lengths = torch.randint(0, SUPPORT_SIZE + 1, (num_users, 1), generator=draw)
    excluded = torch.where(torch.rand(num_users, num_items, generator=draw) < 0.05, -torch.inf, 0.0)
    return TaskBatch(
        support=torch.where(torch.arange(SUPPORT_SIZE) >= SUPPORT_SIZE - lengths, support, -1),
        weights=torch.rand(num_users, SUPPORT_SIZE, generator=draw),
        num_events=lengths[:, 0],
        state=torch.randn(num_users, ranker.state_size, generator=draw),
        state_events=lengths[:, 0],
        track=torch.zeros(num_users, ranker.track_size),
        excluded=excluded,
        prior_rows=lengths[:, 0] % NUM_BUCKETS,
    )


@pytest.mark.parametrize("num_items", [300, 1682, 4000])
def test_a_row_is_the_same_to_the_bit_in_calls_of_every_size(num_items: int) -> None:
    one_thread()
    values = parameters(num_items)
    ranker = Ranker(values, catalogue(values).tables)
    largest = CHUNK_SIZES[-1]
    tasks, priors = drawn_tasks(ranker, largest), torch.randn(NUM_BUCKETS, num_items)
    targets = torch.arange(largest) % num_items
    step, top = ranker.step(tasks, priors, targets), ranker.rank(tasks, priors, 50)
    for size in CHUNK_SIZES:
        rows = slice(largest - size, None)
        some = tasks.taken(rows)
        for whole, part in zip(step, ranker.step(some, priors, targets[rows]), strict=True):
            assert torch.equal(whole[rows], part), size
        for whole, part in zip(top, ranker.rank(some, priors, 50), strict=True):
            assert torch.equal(whole[rows], part), size


def test_a_call_takes_as_many_users_as_have_their_scores_in_the_cache() -> None:
    assert [largest_chunk(num_items) for num_items in (0, 300, 1682, 2500, 10_000)] == [256, 256, 256, 208, 128]
    assert {largest_chunk(num_items) for num_items in range(1, 20_000)} <= set(CHUNK_SIZES)
