"""Vectors of new items that move with the company they are met in."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models import item_contexts
from models.episodes import Interactions
from models.item_contexts import Motion, Takers, contexts, fit_motion, moves
from models.item_tables import ItemTables, assemble_items
from models.meta_parameters import MetaParameters
from models.neighbours import Blocks, Neighbours, PairLayout, initial_pairs, stakes_of
from models.pair_counts import WINDOW, PairTable, Stakes, learn
from models.popularity import NUM_BUCKETS, bucket_of
from models.ranker import Ranker, TaskBatch
from tests.factories import meta_parameters

N = 6
NEW = N  # the row of the new item
STAKES = Stakes(torch.ones(3), torch.tensor([5.0, 20.0, 5.0]))


@pytest.fixture
def parameters() -> MetaParameters:
    known = meta_parameters([f"i{row:02d}" for row in range(N)])
    dims, factors = known.item_out.shape[1], known.item_factors.shape[1]
    noise = torch.randn(dims + factors + 1, dims, generator=torch.Generator().manual_seed(3))
    return replace(known, context_map=noise, pace_direction=noise[0], pairs_online=True)


def tables_of(parameters: MetaParameters) -> ItemTables:
    texts = torch.zeros(N + 1, parameters.text_map.shape[0] - 1)
    return assemble_items(parameters, texts, torch.tensor([*range(N), -1]))


def met_with(parameters: MetaParameters, *others: int) -> PairTable:
    """Pairs after as many users have taken the new item, each right after one of the others."""
    pairs = initial_pairs(parameters, torch.arange(N), N + 1)
    for other in others:
        before = torch.full((1, WINDOW), -1)
        before[0, -1] = other
        learn(pairs, before, torch.tensor([NEW]), stakes_of(parameters))
    return pairs


def laid_out(parameters: MetaParameters, pairs: PairTable) -> Blocks:
    tables, rows = tables_of(parameters), torch.arange(N + 1)
    layout, block = PairLayout(tables), (tables.neighbour_items.clone(), tables.neighbour_values.clone())
    layout.write(block, pairs, rows, (rows, rows))
    return Blocks(*block, (layout.moved,))


def test_a_context_is_the_mean_of_the_vectors_that_an_item_was_counted_with() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    others, counts = torch.tensor([[0, 1, -1], [-1, -1, -1]]), torch.tensor([[3.0, 1.0, 7.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(contexts(others, counts, vectors), torch.tensor([[0.75, 0.25], [0.0, 0.0]]).double())


def test_the_more_takers_the_less_counts_the_text() -> None:
    found, company = torch.tensor([[2.0], [2.0], [2.0]]).double(), torch.tensor([[1.0], [1.0]])
    takers = Takers(torch.tensor([0.0, 5.0, 45.0]), torch.zeros(3))
    told = moves(found, takers, Motion(company, torch.zeros(1), usual_pace=0.1))
    torch.testing.assert_close(told, torch.tensor([[0.0], [1.5], [2.7]]))


def test_pace_is_what_takers_make_of_their_time_and_nothing_without_a_second_one() -> None:
    takers = Takers(torch.tensor([0.0, 1.0, 10.0, 10.0, 10.0]), torch.tensor([0, 0, 90, 9_990, 40]))
    expected = torch.tensor([1.0, 1.0, 1.0, 10 / 1_000, 10 / 5]).double().log()
    torch.testing.assert_close(takers.pace(0.1), expected)
    still = Motion(torch.zeros(2, 1), torch.tensor([3.0]), usual_pace=0.1)
    torch.testing.assert_close(moves(torch.zeros(5, 1), takers, still)[:, 0], 3 * expected.float())


def test_a_new_item_moves_by_the_map_of_its_company(parameters: MetaParameters) -> None:
    moved = laid_out(parameters, met_with(parameters, 0, 0, 1)).moved[0]
    assert moved is not None
    assert moved.rows[0] == NEW
    assert (moved.rows[1:] == N + 1).all(), "the rest fills a cache line"
    vectors = tables_of(parameters).vectors
    company = (2 * vectors[0] + vectors[1]) / 3
    expected = 3 / (3 + item_contexts.PSEUDO_EVENTS) * torch.cat([company, torch.ones(1)]) @ parameters.context_map
    expected += math.log(3 / (1 + 2 * parameters.usual_pace)) * parameters.pace_direction
    torch.testing.assert_close(moved.vectors[0], expected)


def test_the_faster_takers_come_the_further_an_item_moves_that_way(parameters: MetaParameters) -> None:
    slow = met_with(parameters, 0)
    before = torch.full((500, WINDOW), -1)
    learn(slow, before, torch.arange(500) % N, stakes_of(parameters))  # what others take meanwhile
    before[0, -1] = 0
    learn(slow, before[:1], torch.tensor([NEW]), stakes_of(parameters))
    fast, late = (laid_out(parameters, pairs).moved[0] for pairs in (met_with(parameters, 0, 0), slow))
    assert fast is not None
    assert late is not None
    far = math.log((1 + 501 * parameters.usual_pace) / (1 + parameters.usual_pace))
    torch.testing.assert_close(fast.vectors[0] - late.vectors[0], far * parameters.pace_direction)


def test_without_a_map_or_events_nothing_moves(parameters: MetaParameters) -> None:
    assert laid_out(parameters, met_with(parameters)).moved == (None,)
    off = replace(parameters, context_map=parameters.context_map[:0])
    assert laid_out(off, met_with(off, 0, 1)).moved == (None,)


def test_rows_written_one_after_the_other_move_as_those_written_at_once(parameters: MetaParameters) -> None:
    pairs, tables, rows = met_with(parameters), tables_of(parameters), torch.arange(N + 1)
    layout, block = PairLayout(tables), (tables.neighbour_items.clone(), tables.neighbour_values.clone())
    layout.write(block, pairs, rows, (rows, rows))
    for other in (2, 3, -1, 2):  # -1: a user's first item tells no company, and is one event more
        before = torch.full((1, WINDOW), -1)
        before[0, -1] = other
        layout.write(block, pairs, learn(pairs, before, torch.tensor([NEW]), stakes_of(parameters)), (rows, rows))
    moved, anew = layout.moved, laid_out(parameters, pairs).moved[0]
    assert moved is not None
    assert anew is not None
    assert torch.equal(moved.vectors, anew.vectors)


def tasks(num: int, support: Tensor) -> TaskBatch:
    return TaskBatch(
        support=support.expand(num, -1),
        weights=torch.ones(num, support.shape[1]),
        num_events=torch.full((num,), support.shape[1]),
        state=torch.zeros(num, 8),
        state_events=torch.zeros(num, dtype=torch.int64),
        track=torch.zeros(num, 1),
        excluded=torch.zeros(num, N + 1),
        prior_rows=torch.zeros(num, dtype=torch.int64),
    )


def test_each_user_reads_the_vectors_of_her_own_block(parameters: MetaParameters) -> None:
    """As if the catalogue's own vectors had been moved, and only for users of the partition where it happened."""
    still, moved = (laid_out(parameters, met_with(parameters, *others)) for others in ((), (0, 0, 1)))
    both = Blocks(
        torch.cat([still.items, still.items]), torch.cat([still.values, still.values]), still.moved + moved.moved
    )
    tables, priors = tables_of(parameters), torch.zeros(8, N + 1)
    ranker, asked = Ranker(parameters, tables), tasks(4, torch.tensor([[2, 3, 4]]))
    asked.state = torch.zeros(4, ranker.state_size)
    asked.neighbours = Neighbours(both, torch.tensor([0, N + 2, 0, N + 2]))
    found = ranker.start(asked, priors)
    change = moved.moved[0]
    assert change is not None
    vectors = tables.vectors.clone()
    vectors[NEW, : parameters.item_out.shape[1]] += change.vectors[0]
    asked.neighbours = Neighbours(still, torch.zeros(4, dtype=torch.int64))
    expected = Ranker(parameters, replace(tables, vectors=vectors)).start(asked, priors)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found[1::2], expected[1::2])
    torch.testing.assert_close(found[::2], ranker.start(asked, priors)[::2])


def test_what_a_learner_makes_of_earlier_events_is_read_from_the_users_own_block(parameters: MetaParameters) -> None:
    still, moved = (laid_out(parameters, met_with(parameters, *others)) for others in ((), (0, 0, 1)))
    both = Blocks(
        torch.cat([still.items, still.items]), torch.cat([still.values, still.values]), still.moved + moved.moved
    )
    ranker, asked = Ranker(parameters, tables_of(parameters)), tasks(4, torch.tensor([[2, NEW, 4]]))
    asked.prior_rows = bucket_of(asked.num_events)
    priors, offsets = torch.zeros(NUM_BUCKETS, N + 1), []
    for first in ([0, N + 2, 0, N + 2], [0] * 4, [N + 2] * 4):
        asked.neighbours = Neighbours(both, torch.tensor(first))
        offsets.append(ranker.candidate_loss(asked, priors, honest=True).offset)
    mixed, first_block, second_block = offsets
    assert not torch.allclose(first_block, second_block)
    torch.testing.assert_close(mixed[::2], first_block[::2])
    torch.testing.assert_close(mixed[1::2], second_block[1::2])


def topics(*, meaning: bool, popular: bool = False, seed: int = 0) -> tuple[Interactions, Tensor, Tensor]:
    """Users take items of one of two topics; vectors [n, 2] tell the topic, `missed` does or is noise."""
    draw, num = torch.Generator().manual_seed(seed), 200
    topic = torch.arange(num) % 2
    users = torch.arange(12000) // 20
    items = torch.randint(0, num // 2, (12000,), generator=draw) * 2 + users % 2
    if popular:  # the first half of each topic is taken three times as often
        items = torch.where(torch.rand(12000, generator=draw) < 0.5, items % (num // 2), items)
    vectors = torch.nn.functional.one_hot(topic, 2).float()
    missed = vectors @ torch.tensor([[1.0], [-1.0]]) if meaning else torch.randn(num, 1, generator=draw)
    return Interactions(users, items, torch.arange(12000), torch.ones(12000), num), vectors, missed


def test_a_map_is_learnt_where_company_tells_what_the_text_misses() -> None:
    interactions, vectors, missed = topics(meaning=True)
    found = fit_motion(interactions, STAKES, vectors, missed, num_pairs=8, seed=0)
    tens = torch.full((len(vectors),), 10)
    told = moves(vectors.double(), Takers(tens, (tens - 1) / found.usual_pace), found)
    assert float((told - missed).abs().mean()) < 0.2


def test_pace_counts_where_what_is_popular_lies_elsewhere_than_texts_say_and_only_there() -> None:
    interactions, vectors, _ = topics(meaning=True, popular=True)
    popular = torch.where(torch.arange(len(vectors)) < len(vectors) // 2, 1.0, -1.0)[:, None]
    noise = torch.randn(len(vectors), 1, generator=torch.Generator().manual_seed(5))
    found = fit_motion(interactions, STAKES, vectors, popular + noise, num_pairs=8, seed=0)
    assert float(found.pace) > 0.5
    still = fit_motion(interactions, STAKES, vectors, vectors[:, :1] - vectors[:, 1:], num_pairs=8, seed=0)
    assert len(still.company) > 0
    assert float(still.pace) == 0.0


def test_nothing_moves_where_company_and_pace_tell_nothing() -> None:
    interactions, vectors, missed = topics(meaning=False)
    assert fit_motion(interactions, STAKES, vectors, missed, num_pairs=8, seed=0).company.shape == (0, 1)


def test_there_is_no_map_where_few_items_decide() -> None:
    interactions, vectors, missed = topics(meaning=True)
    few = interactions.select(interactions.items < item_contexts.LEAST_ITEMS)
    assert len(fit_motion(few, STAKES, vectors, missed, num_pairs=8, seed=0).company) == 0
