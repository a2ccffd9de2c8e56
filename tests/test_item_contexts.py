"""Vectors of new items that move with the company they are met in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models import item_contexts
from models.episodes import Interactions
from models.item_contexts import contexts, fit_map, moves
from models.item_tables import ItemTables, assemble_items
from models.meta_parameters import MetaParameters
from models.neighbours import Blocks, Neighbours, PairLayout, initial_pairs, stakes_of
from models.pair_counts import WINDOW, PairTable, Stakes, learn
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
    return replace(known, context_map=noise, pairs_online=True)


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


def test_the_more_events_the_less_counts_the_text() -> None:
    found, context_map = torch.tensor([[2.0], [2.0], [2.0]]).double(), torch.tensor([[1.0], [1.0]])
    told = moves(found, torch.tensor([0.0, 20.0, 180.0]), context_map)
    torch.testing.assert_close(told, torch.tensor([[0.0], [1.5], [2.7]]))


def test_a_new_item_moves_by_the_map_of_its_company(parameters: MetaParameters) -> None:
    moved = laid_out(parameters, met_with(parameters, 0, 0, 1)).moved[0]
    assert moved is not None
    assert moved.rows[0] == NEW
    assert (moved.rows[1:] == N + 1).all(), "the rest fills a cache line"
    vectors = tables_of(parameters).vectors
    company = (2 * vectors[0] + vectors[1]) / 3
    expected = 3 / (3 + item_contexts.PSEUDO_EVENTS) * torch.cat([company, torch.ones(1)]) @ parameters.context_map
    torch.testing.assert_close(moved.vectors[0], expected)


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


def topics(*, meaning: bool, seed: int = 0) -> tuple[Interactions, Tensor, Tensor]:
    """Users take items of one of two topics; vectors [n, 2] tell the topic, `missed` does or is noise."""
    draw, num = torch.Generator().manual_seed(seed), 200
    topic = torch.arange(num) % 2
    users = torch.arange(4000) // 20
    items = torch.randint(0, num // 2, (4000,), generator=draw) * 2 + users % 2
    vectors = torch.nn.functional.one_hot(topic, 2).float()
    missed = vectors @ torch.tensor([[1.0], [-1.0]]) if meaning else torch.randn(num, 1, generator=draw)
    return Interactions(users, items, torch.arange(4000), torch.ones(4000), num), vectors, missed


def test_a_map_is_learnt_where_company_tells_what_the_text_misses() -> None:
    interactions, vectors, missed = topics(meaning=True)
    found = fit_map(interactions, STAKES, vectors, missed, num_pairs=8, seed=0)
    told = moves(vectors.double(), torch.full((len(vectors),), 1e6), found)
    assert float((told - missed).abs().mean()) < 0.2


def test_there_is_no_map_where_company_tells_nothing() -> None:
    interactions, vectors, missed = topics(meaning=False)
    assert fit_map(interactions, STAKES, vectors, missed, num_pairs=8, seed=0).shape == (0, 1)


def test_there_is_no_map_where_few_items_decide() -> None:
    interactions, vectors, missed = topics(meaning=True)
    few = interactions.select(interactions.items < item_contexts.LEAST_ITEMS)
    assert len(fit_map(few, STAKES, vectors, missed, num_pairs=8, seed=0)) == 0
