"""The offline worker gives what a worker gives, however its events come in, and notes what stood before each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import pair_counts, popularity, replay
from models.encoder import HashedBagOfWords
from models.episodes import Interactions
from models.figures import query_ranks
from models.meta_parameters import MetaParameters
from models.ranker import Ranker
from pipeline.batching import micro_batch
from pipeline.catalogue import ListedItem
from pipeline.offline_worker import MakeRanker, OfflineWorker, Recorder, TooManyUsers
from pipeline.outcome import Outcome
from schemas.events import Interaction, Rejected, parse_interaction
from tests.factories import Record, chunk, event, meta_parameters, record

ITEMS = sorted(f"item-{number}" for number in range(40))
PARAMETERS = meta_parameters(ITEMS[:30])


def worker(
    parameters: MetaParameters = PARAMETERS,
    *,
    capacity: int = 50,
    num_partitions: int = 1,
    make_ranker: MakeRanker = Ranker,
) -> OfflineWorker:
    torch.set_num_threads(1)
    items = [ListedItem(item_id, number, f"text of {item_id}", True, True) for number, item_id in enumerate(ITEMS, 1)]
    embeddings = HashedBagOfWords(16).encode([item.text for item in items])
    return OfflineWorker(
        parameters, items, embeddings, capacity=capacity, num_partitions=num_partitions, make_ranker=make_ranker
    )


def log(num_events: int, *, num_users: int = 9, seed: int = 3) -> list[Record]:
    """Events of all types, some of items that no catalogue lists, some malformed."""
    draw = random.Random(seed)
    rows = []
    for number in range(num_events):
        kind = draw.choice(["click", "purchase", "dismiss", "impression"])
        body = event(f"u{draw.randrange(num_users)}", draw.choice([*ITEMS, "never-listed"]), f"e{number}", kind)
        rows.append(b"{garbage" if draw.random() < 0.05 else body)
    return [record(row, offset) for offset, row in enumerate(rows)]


def new_items_only(num_users: int = 6) -> list[Interaction]:
    """Clicks that never repeat an item of the user, in a shuffled order of users."""
    draw = random.Random(5)
    pairs = [(f"u{user}", item) for user in range(num_users) for item in draw.sample(ITEMS[:30], 25)]  # no equal scores
    draw.shuffle(pairs)
    rows = [record(event(user, item, f"e{number}"), number) for number, (user, item) in enumerate(pairs)]
    return [found for found in decoded(rows) if isinstance(found, Interaction)]


def decoded(records: Sequence[Record]) -> list[Interaction | Rejected]:
    return [parse_interaction(one.key, one.value, one.timestamp) for one in records]


def judged(outcomes: Sequence[Outcome]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """One row per positive, in order of partition and offset."""
    names = ("partition", "offset", "item_nos", "num_events", "rank_adapted", "rank_start", "rank_popular")
    losses = ("loss_adapted", "loss_start")
    columns = [np.concatenate([getattr(one.prequential, name) for one in outcomes]) for name in (*names, *losses)]
    rows = np.stack(columns, 1).astype(np.float64)
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def test_records_and_decoded_events_give_the_same_figures_however_they_are_cut() -> None:
    records = log(900)
    raw = worker()
    cuts = [chunk(records[at : at + 130]) for at in range(0, 900, 130)]
    expected = judged([raw.apply(micro_batch([cut], raw.positions, parse_interaction)) for cut in cuts])
    for size in (900, 7):
        again = worker()
        assert np.array_equal(judged(list(again.replay(decoded(records), batch_events=size)))[:, :7], expected[:, :7])
        assert np.allclose(judged(list(worker().replay(decoded(records), batch_events=size))), expected, atol=1e-6)
        assert again.positions == raw.positions == {0: 900}
    assert len(expected) > 300


def test_new_items_move_at_offsets_however_events_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """ITEMS[30:] are new to the version; epochs of 32 offsets let their pairs take effect many times."""
    monkeypatch.setattr(popularity, "POPULARITY_EPOCH", 8)
    monkeypatch.setattr(pair_counts, "PAIR_EPOCH", 32)
    dims, factors = PARAMETERS.item_out.shape[1], PARAMETERS.item_factors.shape[1]
    noise = torch.randn(dims + factors + 1, dims, generator=torch.Generator().manual_seed(1))
    moving, events = replace(PARAMETERS, context_map=noise, pace_direction=noise[0]), decoded(log(600))
    at_once, in_pieces, still = (
        judged(list(worker(one, num_partitions=2).replay(events, batch_events=size)))
        for one, size in ((moving, 600), (moving, 23), (PARAMETERS, 600))
    )
    np.testing.assert_allclose(at_once, in_pieces, rtol=0, atol=2e-6)
    assert not np.allclose(at_once[:, -1], still[:, -1], atol=1e-3)


def test_a_replay_predicts_what_a_worker_does_while_popularity_and_pairs_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity, "POPULARITY_EPOCH", 8)
    monkeypatch.setattr(pair_counts, "PAIR_EPOCH", 32)
    events, serving = new_items_only(), worker()
    served = judged(list(serving.replay(events)))
    interactions = Interactions(
        torch.tensor([int(one.user_id[1:]) for one in events]),
        torch.tensor([ITEMS.index(one.item_id) for one in events]),
        torch.tensor([one.ts_ms for one in events]),
        torch.ones(len(events)),
        len(ITEMS),
    )
    everybody = torch.ones(len(events), dtype=torch.bool)
    found = replay.replay_start(serving.ranker, interactions, 0, everybody, lambda *_: None)
    assert np.array_equal(query_ranks(found.start, found.targets[:, None])[:, 0].numpy(), served[:, 5])


def test_a_user_of_several_partitions_worlds_lives_in_one() -> None:
    several = worker(num_partitions=3)
    outcomes = list(several.replay(decoded(log(600)), batch_events=50))
    rows = judged(outcomes)
    assert set(rows[:, 0]) == {0.0, 1.0, 2.0}
    assert sum(several.positions.values()) == 600
    dead = [letter.reason for one in outcomes for letter in one.batch.dead_letters]
    assert set(dead) == {"BAD_JSON"}, "no user turns up in a foreign partition"


@pytest.mark.parametrize(("size", "partitions"), [(1, 1), (40, 1), (150, 4)])
def test_the_noted_ranks_are_those_of_the_record_made_before_learning(
    size: int, partitions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # batches in which every partition enters other epochs
    monkeypatch.setattr(popularity, "POPULARITY_EPOCH", 4)
    monkeypatch.setattr(pair_counts, "PAIR_EPOCH", 8)
    noting = worker(make_ranker=Recorder, num_partitions=partitions)
    events = sorted(new_items_only(), key=lambda one: noting.partition_of(one.user_id))
    ranker = noting.ranker
    assert isinstance(ranker, Recorder)
    rows = noting.catalogue.row_of[[noting.catalogue.number_of[one.item_id] for one in events]]
    ranker.expect(np.stack([rows, np.full(len(rows), -1)], 1))
    record_made = judged(list(noting.replay(events, batch_events=size)))
    noted = ranker.take_noted()
    assert np.array_equal(noted.ranks_adapted[:, 0].numpy(), record_made[:, 4])
    assert np.array_equal(noted.ranks_start[:, 0].numpy(), record_made[:, 5])
    assert (noted.ranks_adapted[:, 1] == 0).all(), "an absent query item has no rank"
    assert (record_made[:, 4] != record_made[:, 5]).any(), "the inner step must move something"
    for row, (own, rank) in enumerate(zip(rows.tolist(), record_made[:, 4].astype(int).tolist(), strict=True)):
        if rank <= 10:
            assert noted.listed_adapted[row, rank - 1] == own


def test_remembered_history_conditions_the_start_and_leaves_the_adapter_empty() -> None:
    events = new_items_only()
    warm, cold = worker(), worker()
    warm.remember(events[:100])
    first, second = (next(one.replay(events[100:101])) for one in (warm, cold))
    slot = warm.table.slots([events[100].user_id])
    assert first.prequential.num_events[0] == sum(one.user_id == events[100].user_id for one in events[:100]) > 0
    assert first.prequential.loss_start[0] != second.prequential.loss_start[0]
    assert first.prequential.loss_start[0] == first.prequential.loss_adapted[0]
    assert warm.table.adapter_events[slot] == 1, "of the event applied, not of those remembered"


def test_more_users_than_slots_are_refused() -> None:
    with pytest.raises(TooManyUsers, match="capacity=4"):
        list(worker(capacity=4).replay(decoded(log(100))))


def test_expected_events_that_do_not_come_are_not_passed_over() -> None:
    noting = worker(make_ranker=Recorder)
    assert isinstance(noting.ranker, Recorder)
    noting.ranker.expect(np.zeros((3, 1), np.int64))
    list(noting.replay(new_items_only()[:2]))
    with pytest.raises(ValueError, match="1 expected events were not scored"):
        noting.ranker.take_noted()


def test_lists_name_items_by_their_ids() -> None:
    offline = worker()
    events = new_items_only()
    outcome = list(offline.replay(events, batch_events=1000))[-1]
    lists = offline.listed(outcome, 10)
    had = {one.item_id for one in events if one.user_id == "u1"}
    assert len(lists) == 6
    assert len(lists["u1"]) == 10
    assert not had & set(lists["u1"])


def test_a_successor_under_the_same_version_goes_on_as_if_nothing_had_changed_and_disturbs_nobody() -> None:
    # gates begin anew under any other version, so here they let everything through
    parameters, events = replace(PARAMETERS, gate_credit=1e6), decoded(log(900))
    one, undisturbed = (worker(parameters, num_partitions=2) for _ in range(2))
    for each in (one, undisturbed):
        list(each.replay(events[:600], batch_events=100))
    items = [ListedItem(item_id, number, f"text of {item_id}", True, True) for number, item_id in enumerate(ITEMS, 1)]
    embeddings = HashedBagOfWords(16).encode([item.text for item in items])
    same = one.successor(parameters, items, embeddings, np.eye(16))
    afresh = one.successor(parameters, items, embeddings, None)
    figures = [judged(list(each.replay(events[600:], batch_events=100))) for each in (same, afresh, one, undisturbed)]
    np.testing.assert_array_equal(figures[0], figures[3])
    np.testing.assert_array_equal(figures[2], figures[3])
    assert not np.array_equal(figures[1], figures[3]), "without a map states begin anew"
