"""Pairs counted online: against a dictionary, in any cutting, in bounded slots, and as the ranker reads them."""

from collections import Counter
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models.item_fitting import HORIZONS, similarity_scale
from models.item_tables import ItemTables, assemble_items
from models.neighbours import PairLayout, initial_pairs
from models.pair_counts import PAIR_EPOCH, PairTable, Stakes, empty, learn
from models.popularity import POPULARITY_EPOCH
from pipeline.item_statistics import NUM_BUCKETS, ItemStatistics, OnlinePairs, PairEvents
from pipeline.pair_rows import log_row, saved_pairs, snapshot_row
from pipeline.served_pairs import ServedPairs
from tests.factories import meta_parameters

N, W = 12, 20
PSEUDO_EVENTS = (5.0, 20.0, 5.0)
STAKES = Stakes(torch.ones(3), torch.tensor(PSEUDO_EVENTS))


def events(num: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Items and what came before each, some slots empty, some items repeated."""
    draw = torch.Generator().manual_seed(seed)
    before = torch.randint(0, N, (num, W), generator=draw)
    lengths = torch.randint(0, W + 1, (num, 1), generator=draw)
    absent = torch.arange(W, 0, -1) > lengths
    return before.masked_fill(absent, -1), torch.randint(0, N, (num,), generator=draw)


def reference(before: Tensor, items: Tensor) -> tuple[list[Counter[tuple[int, int]]], Counter[int]]:
    """Count with dictionaries, as the docstrings say."""
    counts: list[Counter[tuple[int, int]]] = [Counter(), Counter(), Counter()]
    users: Counter[int] = Counter()
    for had, item in zip(before.tolist(), items.tolist(), strict=True):
        known = [one for one in had if one >= 0]
        if item not in known:
            users[item] += 1
            for other in set(known):
                counts[0][other, item] += 1
                counts[0][item, other] += 1
        for part in (1, 2):
            for other in had[-HORIZONS[part] :]:
                if other >= 0 and other != item:
                    counts[part][other, item] += 1
    return counts, users


def as_dictionaries(table: PairTable) -> list[dict[tuple[int, int], float]]:
    found: list[dict[tuple[int, int], float]] = [{}, {}, {}]
    for row, slot in (table.others >= 0).nonzero().tolist():
        for part, count in enumerate(table.counts[row, slot].tolist()):
            if count:
                found[part][row, int(table.others[row, slot])] = count
    return found


def test_with_a_slot_for_every_pair_the_counts_are_those_of_dictionaries() -> None:
    before, items = events(300)
    table = empty(N, N)
    for rows in torch.split(torch.arange(300), 97):
        learn(table, before[rows], items[rows], STAKES)
    counts, users = reference(before, items)
    assert as_dictionaries(table) == [dict(part) for part in counts]
    assert table.users.tolist() == [users[item] for item in range(N)]
    takers = items[(before != items[:, None]).all(1)].tolist()
    assert table.arrived.tolist() == [1 + takers.index(item) for item in range(N)]
    assert table.latest.tolist() == [len(takers) - takers[::-1].index(item) for item in range(N)]


def test_the_order_of_events_within_an_epoch_changes_no_pair() -> None:
    before, items = events(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    one, other = empty(N, 5), empty(N, 5)
    changed = learn(one, before, items, STAKES)
    assert torch.equal(learn(other, before[order], items[order], STAKES), changed)
    for name in ("others", "counts", "scale", "entered", "users"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_stronger_pairs_take_the_places_of_weaker_ones_and_count_from_then_on() -> None:
    table = empty(4, 1)
    alone = torch.full((1, W), -1)

    def saw(had: int, item: int) -> None:
        before = alone.clone()
        before[0, -1] = had
        learn(table, before, torch.tensor([item]), STAKES)

    saw(0, 1)
    assert int(table.others[0, 0]) == 1
    saw(0, 2)
    assert int(table.others[0, 0]) == 1, "an equal pair does not displace"
    learn(table, alone.repeat(3, 1).index_fill_(1, torch.tensor([W - 1]), 0), torch.tensor([2, 2, 2]), STAKES)
    assert int(table.others[0, 0]) == 2
    assert table.counts[0, 0].tolist() == [3.0, 3.0, 3.0]
    assert float(table.entered[0, 0]) > 0, "0 marks pairs that the version brought"


class Block:
    """Rows of pairs whose items are numbered by their catalogue rows."""

    def __init__(self, tables: ItemTables) -> None:
        self.items, self.values = tables.neighbour_items.clone(), tables.neighbour_values.clone()
        self._layout, self._rows = PairLayout(tables), torch.arange(tables.num_items)

    def write(self, pairs: PairTable, rows: Tensor) -> None:
        self._layout.write((self.items, self.values), pairs, rows, (self._rows, self._rows))


def test_a_block_serves_the_shrinkage_between_prediction_and_counts() -> None:
    parameters = meta_parameters([f"i{row:02d}" for row in range(N)])
    tables = assemble_items(parameters, torch.zeros(N + 2, 16), torch.tensor([*range(N), -1, -1]))
    numbers = torch.arange(N + 2)
    pairs = initial_pairs(parameters, torch.arange(N), N + 2)
    before, items = events(400)
    changed = learn(pairs, before + (before >= 0).long(), items + 1, STAKES)
    block = Block(tables)
    block.write(pairs, numbers)
    row, slot = 3, 2
    other = int(pairs.others[row, slot])
    q = similarity_scale(pairs.users[row], pairs.users[other]) if row in changed else pairs.scale[row, slot]
    dims = tables.item_in.shape[2]
    predicted = tables.pair_means[row] + tables.item_in[row, :3] @ tables.vectors[other, :dims]
    expected = (pairs.counts[row, slot] + torch.tensor(PSEUDO_EVENTS) * predicted) / (q + torch.tensor(PSEUDO_EVENTS))
    if float(pairs.entered[row, slot]) == 0:
        torch.testing.assert_close(block.values[row, :3, slot] + predicted, expected, atol=1e-5, rtol=1e-5)
    assert int(block.items[row, slot]) == other
    assert not bool(block.values[pairs.others.new_tensor([N + 1])][..., 0].isnan().any())


def test_rows_refreshed_one_epoch_after_the_other_are_those_of_a_new_block() -> None:
    parameters = meta_parameters([f"i{row:02d}" for row in range(N)])
    tables = assemble_items(parameters, torch.zeros(N, 16), torch.arange(N))
    numbers = torch.arange(N)
    pairs = initial_pairs(parameters, numbers, N)
    block, fresh = Block(tables), Block(tables)
    block.write(pairs, numbers)
    version = block.values.clone()
    for seed in range(4):
        before, items = events(30, seed=seed)
        block.write(pairs, learn(pairs, before, items, STAKES))
    fresh.write(pairs, numbers)
    assert torch.equal(block.items, fresh.items)
    torch.testing.assert_close(block.values, fresh.values, atol=1e-6, rtol=1e-6)
    assert not torch.equal(block.values, version)


def pair_events(num: int, first_offset: int) -> PairEvents:
    before, items = events(num, seed=first_offset)
    return PairEvents(0, first_offset, items.numpy().astype(np.int32), before.numpy().astype(np.int32))


def test_snapshot_and_log_give_the_pairs_back() -> None:
    pairs = OnlinePairs(7, empty(N, 5), STAKES)
    pairs.pending = [pair_events(20, 3), pair_events(30, 500)]
    pairs.settle(PAIR_EPOCH)
    snapshot = (0, 7, *snapshot_row(pairs))
    logged = [pair_events(10, PAIR_EPOCH + 1), pair_events(15, PAIR_EPOCH + 700), pair_events(9, 2 * PAIR_EPOCH)]
    pairs.pending = list(logged)
    pairs.settle(2 * PAIR_EPOCH)
    saved = saved_pairs(snapshot, [log_row(one) for one in logged])
    assert saved.table is not None
    again = OnlinePairs(saved.version, saved.table, STAKES, saved.log)
    again.settle(2 * PAIR_EPOCH)
    for name in ("others", "counts", "scale", "entered", "users", "arrived", "latest"):
        expected = getattr(pairs.table, name)
        assert torch.equal(getattr(again.table.grown(N), name), expected), name
    assert [one.first_offset for one in again.pending] == [2 * PAIR_EPOCH]
    assert np.array_equal(again.pending[0].before, logged[2].before)


def test_pairs_as_their_version_brought_them_are_not_written_again_and_go_on_as_if_they_were() -> None:
    parameters = meta_parameters([f"i{row:02d}" for row in range(N)])
    brought = partial(initial_pairs, parameters, torch.arange(N), N)
    logged = [pair_events(20, 3)]
    held, found = (ItemStatistics(0, torch.zeros(NUM_BUCKETS, N), 100.0) for _ in range(2))
    held.take_pairs(7, STAKES, brought)
    assert held.pairs is not None
    snapshot = (0, 7, *snapshot_row(held.pairs))
    assert not any(snapshot[2:])
    held.pairs.pending = list(logged)
    held.move_to(PAIR_EPOCH)
    found.epoch_offset, found.saved_pairs = PAIR_EPOCH, saved_pairs(snapshot, [log_row(one) for one in logged])
    found.take_pairs(7, STAKES, brought)
    assert found.pairs is not None
    for name in ("others", "counts", "scale", "entered", "users", "arrived", "latest"):
        assert torch.equal(getattr(found.pairs.table, name), getattr(held.pairs.table, name)), name
    assert snapshot_row(found.pairs) == snapshot_row(held.pairs)
    assert snapshot_row(held.pairs)[0], "what has been counted is written"
    again = ItemStatistics(PAIR_EPOCH, torch.zeros(NUM_BUCKETS, N), 100.0)
    again.saved_pairs = saved_pairs((0, 7, *snapshot_row(held.pairs)), [])
    again.take_pairs(7, STAKES, brought)
    assert again.pairs is not None
    assert snapshot_row(again.pairs) == snapshot_row(held.pairs), "also by who has read it and counted nothing since"


def test_popularity_takes_effect_sooner_than_pairs() -> None:
    held = ItemStatistics(0, torch.zeros(NUM_BUCKETS, N), 100.0)
    held.take_pairs(7, STAKES, partial(empty, N, 5))
    assert held.pairs is not None
    held.pairs.pending = [pair_events(20, 3)]
    held.add(np.array([0]), np.array([4]))
    assert not held.move_to(POPULARITY_EPOCH - 1)
    assert held.move_to(POPULARITY_EPOCH)
    assert held.counts[0, 4] == 1
    held.move_to(PAIR_EPOCH - 1)
    assert held.pairs.pending
    held.move_to(PAIR_EPOCH)
    assert not held.pairs.pending
    assert held.pairs.epochs == 1


def test_events_take_effect_epoch_by_epoch_however_late_they_are_settled() -> None:
    late, early = OnlinePairs(7, empty(N, 5), STAKES), OnlinePairs(7, empty(N, 5), STAKES)
    for number in range(5):
        late.pending.append(pair_events(40, number * PAIR_EPOCH // 2))
        early.pending.append(pair_events(40, number * PAIR_EPOCH // 2))
        early.settle(number * PAIR_EPOCH // 2 // PAIR_EPOCH * PAIR_EPOCH)
    late.settle(2 * PAIR_EPOCH)
    early.settle(2 * PAIR_EPOCH)
    assert torch.equal(late.table.counts, early.table.counts)
    assert torch.equal(late.changed, early.changed)


def test_pairs_that_began_anew_are_laid_out_anew_and_earlier_epochs_stay_readable() -> None:
    parameters = meta_parameters([f"i{row:02d}" for row in range(N)])
    tables = assemble_items(parameters, torch.zeros(N, 16), torch.arange(N))
    rows = np.arange(N)
    served = ServedPairs(tables, rows, lambda: rows)

    def block(first: int) -> Tensor:
        return served.tables[1][first : first + N].clone()

    pairs = OnlinePairs(1, initial_pairs(parameters, torch.arange(N), N), STAKES)
    served.begin_batch()
    first = served.first_row(0, pairs)
    before = block(first)
    pairs.pending = [pair_events(200, 3)]
    pairs.settle(PAIR_EPOCH)
    later = served.first_row(0, pairs)
    assert torch.equal(block(first), before), "events of the earlier epoch read it still"
    assert not torch.equal(block(later), before)
    served.begin_batch()
    began = served.first_row(0, OnlinePairs(1, initial_pairs(parameters, torch.arange(N), N), STAKES))
    assert torch.equal(block(began), before)
    assert len(served.tables[0]) == 2 * (N + 1), "places are used again"
