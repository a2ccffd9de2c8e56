"""Micro-batches against a real database: the law, its fates, and independence of how the log is cut."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np
import psycopg2
import pytest
import torch

from models import pair_counts, popularity
from models.candidates import Sampling
from models.encoder import HashedBagOfWords
from models.ranker import Ranker
from pipeline import batch_rows, item_statistics
from pipeline.adaptation import Adaptation, Types
from pipeline.batching import LostRecords
from pipeline.flood_gate import DeadLetterFlood
from pipeline.loop import Loop
from pipeline.loop_take_over import DataGap, TopicRecreated
from pipeline.loop_versions import Sources
from pipeline.session import SESSION, Fenced
from pipeline.store import Store
from pipeline.support import UserTable
from schemas.database import connect_engine
from schemas.events import parse_interaction
from tests.conftest import Database
from tests.factories import Record, chunk, event, learnt_fields, meta_parameters, record

ITEMS = [f"item-{number}" for number in range(40)]
PARAMETERS = meta_parameters(ITEMS[:30])
ENCODER = HashedBagOfWords(16)


def query(url: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(statement, values)
        return cursor.fetchall() if cursor.description else []


def fill(url: str) -> None:
    """A live version and a catalogue, as meta-train and the items topic leave them."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO innerloop.meta_versions (status, artefact, sha256, encoder) VALUES ('live', 'x', 'x', 'test')"
        )
        cursor.execute("INSERT INTO innerloop.catalogue_snapshots DEFAULT VALUES")
        cursor.executemany(
            "INSERT INTO innerloop.items (item_id, text, snapshot) VALUES (%s, %s, 1)",
            [(i, f"text of {i}") for i in ITEMS],
        )
        connection.commit()


def make_loop(url: str, *, capacity: int = 500, limit: tuple[float, int] = (0.5, 1000), gap: bool = False) -> Loop:
    engine = connect_engine(url, options=SESSION)
    table = UserTable(capacity, support_size=10, state_size=0, id_horizon=100, seen_horizon=70)
    loop = Loop(
        Store(engine, id_horizon=100, seen_horizon=70),
        Adaptation(table, Types.of({}), top_n=10),
        Sources(lambda _: PARAMETERS, lambda texts, _: ENCODER.encode(texts)),
        topics=("interactions", "items"),
        parse=parse_interaction,
        dead_letter_limit=limit,
        accept_data_gap=gap,
    )
    loop.wait_for_version()
    return loop


def assign(loop: Loop, num_partitions: int = 1, end: int = 10**6) -> None:
    loop.take_over({("interactions", partition): (0, end) for partition in range(num_partitions)})


@pytest.fixture
def url(database: Database) -> str:
    fill(database.owner_url)
    torch.set_num_threads(1)
    return database.writer_url


def log(num_events: int, *, num_users: int = 12, seed: int = 1) -> list[Record]:
    """Clicks, purchases, dismissals, repeats, conflicts and garbage, in one partition."""
    draw = random.Random(seed)
    rows: list[bytes] = []
    for number in range(num_events):
        luck = draw.random()
        user, item = f"u{int(num_users * draw.random() ** 2)}", draw.choice([*ITEMS, "never-listed"])
        kind = draw.choice(["click", "purchase", "rating", "dismiss", "impression"])
        if luck < 0.05 and rows:
            rows.append(draw.choice(rows[-200:]))
        elif luck < 0.07:
            rows.append(event(user, item, f"e{draw.randrange(max(1, number))}", kind))
        elif luck < 0.09:
            rows.append(b"{garbage")
        else:
            rows.append(event(user, item, f"e{number}", kind))
    return [record(row, offset) for offset, row in enumerate(rows)]


def feed(loop: Loop, records: Sequence[Record], sizes: Iterator[int], *, ahead: bool = False) -> None:
    """Bring records in by batches; `ahead` computes each while the one before is being committed."""
    start, step = 0, loop.begin if ahead else loop.advance
    while start < len(records):
        size = next(sizes)
        step([chunk(records[start : start + size])])
        start += size
    loop.settle()


STATE = """SELECT user_id, last_offset, num_events, num_applied, support_items, support_types, adapter, track,
    adapter_events, adapter_use, top_items, top_scores, recent_ids, recent_seen, num_seen
    FROM innerloop.user_state ORDER BY user_id"""
STREAM_TABLES = ("user_state", "stream_position", "prequential", "dead_letters", "item_statistics", "activations",
                 "event_ids", "seen_items", "popular_items", "pair_snapshots", "pair_log")  # fmt: skip
LAW = "SELECT next_offset, applied, dead_lettered, duplicates, dropped, skipped FROM innerloop.stream_position"
RECORD = """SELECT "offset", user_id, item_id, num_events, rank_adapted, rank_start, rank_popular
    FROM innerloop.prequential_events ORDER BY 1, partition"""
LOSSES = 'SELECT loss_adapted, loss_start FROM innerloop.prequential_events ORDER BY "offset"'


def forget_all(database: Database) -> None:
    """Take away everything that the stream has made."""
    for table in STREAM_TABLES:
        query_write(database.owner_url, f"TRUNCATE innerloop.{table}")


def sizes(seed: int, largest: int) -> Iterator[int]:
    draw = random.Random(seed)
    while True:
        yield draw.randint(1, largest)


@pytest.mark.parametrize(
    ("from_items", "method"),
    [
        (5000, "honest vector honest"),
        (10, "honest vector honest"),
        (10, "honest vector memories"),
        (5000, "meta-sgd lora honest"),
        (5000, "maml vector events"),
    ],
)
def test_the_same_log_gives_the_same_rows_however_it_is_cut(
    from_items: int, method: str, url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranker, "sampling", Sampling(from_items, 12))
    learner, adapter, residuals = method.split()
    if residuals == "memories":
        mixed: dict[str, Any] = {
            "memory_decays": torch.full((2, 4), 0.5) * torch.tensor([[1.0], [1.5]]),
            "memory_rate": 4.0,
        }
        monkeypatch.setattr(sys.modules[__name__], "PARAMETERS", replace(PARAMETERS, **mixed))
    elif learner != "honest":
        fields: dict[str, Any] = {**learnt_fields(learner, adapter), "residuals": residuals}
        monkeypatch.setattr(sys.modules[__name__], "PARAMETERS", replace(PARAMETERS, **fields))
    records = log(2600)
    first = make_loop(url)
    assign(first)
    feed(first, records, sizes(1, 700))
    expected = [query(database.owner_url, statement) for statement in (STATE, LAW, RECORD)]
    losses = np.array(query(database.owner_url, LOSSES))
    assert expected[1][0][0] == len(records)
    assert min(expected[1][0][1:4]) > 0, "the log must hold every fate"
    assert any(row[2] > 60 for row in expected[0]), "some user must have more history than a slot's tail"
    assert {row[9] for row in expected[0]} >= {1, 2}, "some adapters must be served, some not"
    forget_all(database)
    # a table for five users only: almost every batch forgets somebody and reads him again
    second = make_loop(url, capacity=13)
    assign(second)
    feed(second, records, sizes(2, 40), ahead=True)
    assert [query(database.owner_url, statement) for statement in (STATE, LAW, RECORD)] == expected
    np.testing.assert_allclose(np.array(query(database.owner_url, LOSSES)), losses, rtol=1e-6)


def query_write(url: str, statement: str) -> None:
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        connection.commit()


def test_a_replayed_log_changes_no_row(url: str, database: Database) -> None:
    records = log(400)
    loop = make_loop(url)
    assign(loop)
    feed(loop, records, sizes(1, 90))
    tables = [*(STATE, LAW, RECORD), 'SELECT * FROM innerloop.dead_letters ORDER BY "offset"']
    before = [query(database.owner_url, statement) for statement in tables]
    again = make_loop(url)
    assign(again)
    feed(again, records, sizes(5, 50))
    assert [query(database.owner_url, statement) for statement in tables] == before


def test_workers_restarted_amid_an_epoch_write_the_rows_of_one_that_was_not(url: str, database: Database) -> None:
    # an item that came first in this epoch is pending: the counts that are stored know nothing of it yet
    records = log(3500)
    straight = make_loop(url)
    assign(straight)
    feed(straight, records, sizes(1, 700))
    expected = [query(database.owner_url, statement) for statement in (STATE, RECORD)]
    pairs = straight.adaptation.statistics[0].pairs
    assert pairs is not None
    assert pairs.epochs == 3, "pairs must have moved"
    forget_all(database)
    for first in range(0, len(records), 500):
        restarted = make_loop(url)
        assign(restarted)
        feed(restarted, records[first : first + 500], sizes(3, 130))
    assert [query(database.owner_url, statement) for statement in (STATE, RECORD)] == expected
    again = restarted.adaptation.statistics[0].pairs
    assert again is not None
    assert torch.equal(again.table.counts, pairs.table.counts)


def shared_out(records: Sequence[Record], num_partitions: int) -> list[list[Record]]:
    """The log by partition: each user's records in one of them, in their order, numbered from 0."""
    rows: list[list[Record]] = [[] for _ in range(num_partitions)]
    for one in records:
        partition = crc32(one.key or b"") % num_partitions
        rows[partition].append(record(one.value, len(rows[partition]), partition=partition, key=one.key))
    return rows


def feed_partitions(loop: Loop, rows: Sequence[list[Record]], partitions: Sequence[int], sizes: Iterator[int]) -> None:
    """Bring stretches of several partitions into one batch each, in turn."""
    at = dict.fromkeys(partitions, 0)
    while any(at[one] < len(rows[one]) for one in partitions):
        now = {one: rows[one][at[one] : at[one] + next(sizes)] for one in partitions}
        loop.advance([chunk(found) for found in now.values() if found])
        at = {one: at[one] + len(now[one]) for one in partitions}


def test_four_partitions_in_one_worker_write_the_rows_of_four_partitions_in_two(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # short epochs, and batches that hold several of them of every partition
    monkeypatch.setattr(popularity, "POPULARITY_EPOCH", 32)
    monkeypatch.setattr(pair_counts, "PAIR_EPOCH", 128)
    rows = shared_out(log(2400, num_users=40), 4)
    assert min(map(len, rows)) > 300
    alone = make_loop(url)
    assign(alone, 4)
    feed_partitions(alone, rows, range(4), sizes(1, 400))
    expected = [query(database.owner_url, statement) for statement in (STATE, RECORD)]
    forget_all(database)
    for mine, seed in (((0, 2), 2), ((1, 3), 3)):
        one_of_two = make_loop(url)
        one_of_two.take_over({("interactions", partition): (0, 10**6) for partition in mine})
        feed_partitions(one_of_two, rows, mine, sizes(seed, 60))
    assert [query(database.owner_url, statement) for statement in (STATE, RECORD)] == expected


def test_a_snapshot_takes_away_the_log_that_it_contains(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_statistics, "SNAPSHOT_EPOCHS", 2)
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(2600), sizes(1, 300))
    assert query(database.owner_url, "SELECT epoch_offset FROM innerloop.pair_snapshots") == [(2048,)]
    ((first,),) = query(database.owner_url, "SELECT min(first_offset) FROM innerloop.pair_log")
    assert first >= 2048
    resumed = make_loop(url)
    assign(resumed)
    held, again = loop.adaptation.statistics[0].pairs, resumed.adaptation.statistics[0].pairs
    assert held is not None
    assert again is not None
    assert torch.equal(held.table.others, again.table.others)


def test_a_worker_whose_partition_was_moved_by_another_writes_nothing(url: str, database: Database) -> None:
    records = log(300)
    frozen, other = make_loop(url), make_loop(url)
    assign(frozen)
    feed(frozen, records[:100], iter([100]))
    assign(other)
    feed(other, records[100:200], iter([100]))
    before = query(database.owner_url, STATE)
    with pytest.raises(Fenced):
        frozen.advance([chunk(records[100:300])])
    assert query(database.owner_url, STATE) == before


class Stopped:
    """A source of COPY that stops half-way, as the process of a frozen worker does, and goes on when told to."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.reached, self.goes_on = rows, threading.Event(), threading.Event()

    def read(self, size: int) -> bytes:
        self.reached.set()
        assert self.goes_on.wait(60)
        found: bytes = self.rows.read(size)
        return found


@pytest.mark.parametrize("rows", ["states_copy", "prequential_copy"])
def test_a_worker_that_stops_amid_copying_keeps_nobody_waiting(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    # The server never times a session out that is in a COPY, so no lock may be held there.
    records = log(100)
    frozen, heir = make_loop(url), make_loop(url)
    assign(frozen)
    assign(heir)
    stopped: list[Stopped] = []
    make = getattr(batch_rows, rows)

    def stopping(*arguments: Any, **named: Any) -> Any:
        if stopped:
            return make(*arguments, **named)
        stopped.append(Stopped(make(*arguments, **named)))
        return stopped[0]

    monkeypatch.setattr(batch_rows, rows, stopping)
    with ThreadPoolExecutor(1) as thread:
        late = thread.submit(frozen.advance, [chunk(records)])
        while not (stopped and stopped[0].reached.wait(1)):
            assert not late.done(), late.exception()
        heir.patiently.stopping = True  # should it have to wait, it says so instead of trying again
        heir.advance([chunk(records)])
        written = query(database.owner_url, STATE)
        stopped[0].goes_on.set()
        with pytest.raises(Fenced):
            late.result()
    assert query(database.owner_url, STATE) == written


def test_a_batch_is_durable_once_the_next_one_has_been_computed(url: str) -> None:
    loop = make_loop(url)
    assign(loop)
    records = log(90)
    assert loop.begin([chunk(records[:30])]) == {}
    assert loop.begin([chunk(records[30:60])]) == {("interactions", 0): 30}
    assert loop.settle() == {("interactions", 0): 60}
    assert loop.advance([chunk(records[60:])]) == {("interactions", 0): 90}
    assert loop.settle() == {}


def test_missing_offsets_are_counted_as_skipped(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    loop.advance([chunk([record(event("u1", "item-1", "a"), 3), record(event("u1", "item-2", "b"), 7)], start=0)])
    assert query(database.owner_url, LAW) == [(8, 2, 0, 0, 0, 6)]


def test_items_are_walked_like_events(url: str, database: Database) -> None:
    loop = make_loop(url)
    loop.take_over({("items", 0): (0, 9)})
    rows = [b'{"v":1,"item_id":"new","text":"a"}', b"{", b'{"v":1,"item_id":"new","text":"b"}']
    records = [Record("items", 0, offset, 0, b"new", value) for offset, value in zip((0, 1, 4), rows, strict=True)]
    loop.advance([chunk(records[:2]), chunk(records)])
    assert query(database.owner_url, LAW) == [(5, 2, 1, 0, 0, 2)]
    assert query(database.owner_url, "SELECT text FROM innerloop.items WHERE item_id = 'new'") == [("b",)]
    with pytest.raises(LostRecords):
        loop.advance([chunk([Record("items", 0, 9, 0, b"new", rows[0])])])


def test_what_a_version_counted_holds_also_where_partitions_were_taken_over_before_the_catalogue_came(
    url: str, database: Database
) -> None:
    records = log(1500)
    loop = make_loop(url)
    assign(loop)
    feed(loop, records, sizes(1, 300))
    expected = query(database.owner_url, RECORD)
    forget_all(database)
    query_write(database.owner_url, "TRUNCATE innerloop.items, innerloop.catalogue_snapshots CASCADE")
    late = make_loop(url)
    late.take_over({("interactions", 0): (0, 10**6), ("items", 0): (0, len(ITEMS))})
    rows = [json.dumps({"v": 1, "item_id": item, "text": f"text of {item}"}).encode() for item in ITEMS]
    late.advance([chunk([Record("items", 0, n, 0, ITEMS[n].encode(), row) for n, row in enumerate(rows)])])
    feed(late, records, sizes(1, 300))
    assert query(database.owner_url, RECORD) == expected


def test_items_written_again_use_up_no_numbers(url: str, database: Database) -> None:
    loop = make_loop(url)
    loop.take_over({("items", 0): (0, 99)})
    start = 0
    for text in "abc":
        items = [*ITEMS, f"new-{text}"]
        rows = [(item.encode(), f'{{"v":1,"item_id":"{item}","text":"{text}"}}'.encode()) for item in items]
        loop.advance([chunk([Record("items", 0, start + n, 0, key, row) for n, (key, row) in enumerate(rows)])])
        start += len(rows)
    numbers = query(database.owner_url, "SELECT count(*), max(item_no) FROM innerloop.items")
    assert numbers == [(len(ITEMS) + 3, len(ITEMS) + 3)]


def test_a_topic_that_lost_events_stops_the_worker_until_the_gap_is_accepted(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    loop.advance([chunk([record(event("u1", "item-1", "a"), 0)])])
    with pytest.raises(DataGap, match=r"DATA_GAP interactions\[0\] 1\.\.50"):
        make_loop(url).take_over({("interactions", 0): (50, 90)})
    willing = make_loop(url, gap=True)
    assert willing.take_over({("interactions", 0): (50, 90)}) == {("interactions", 0): 50}
    assert query(database.owner_url, LAW) == [(50, 1, 0, 0, 0, 49)]


def test_a_topic_that_was_made_anew_is_refused(url: str) -> None:
    loop = make_loop(url)
    assign(loop)
    loop.advance([chunk([record(event("u1", "item-1", "a"), 0)])])
    with pytest.raises(TopicRecreated):
        make_loop(url).take_over({("interactions", 0): (0, 0)})


def test_a_flood_of_garbage_stops_the_worker_before_it_is_dead_lettered(url: str, database: Database) -> None:
    loop = make_loop(url, limit=(0.5, 100))
    assign(loop)
    loop.advance([chunk([record(event("u1", f"item-{n % 40}", f"e{n}"), n) for n in range(60)])])
    with pytest.raises(DeadLetterFlood, match="BAD_JSON"):
        loop.advance([chunk([record(b"{", n) for n in range(60, 160)])])
    assert query(database.owner_url, LAW) == [(60, 60, 0, 0, 0, 0)]


def test_a_user_in_a_second_partition_is_a_dead_letter_there(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop, 2)
    loop.advance([chunk([record(event("u1", "item-1", "a"), 0)])])
    loop.advance([chunk([record(event("u1", "item-2", "b"), 0, partition=1)])])
    reasons = query(database.owner_url, "SELECT partition, reason FROM innerloop.dead_letters")
    assert reasons == [(1, "KEY_MISMATCH")]


def test_dismissed_and_seen_items_leave_the_list_unknown_ones_stay_in_the_support(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    loop.advance([chunk([record(event("u1", "item-1", "a"), 0)])])
    listed = [row[0] for row in query(database.reader_url, "SELECT item_id FROM innerloop.recommend('u1', 10)")]
    assert "item-1" not in listed
    refused = listed[0]
    loop.advance([chunk([record(event("u1", refused, "b", "dismiss"), 1), record(event("u1", "odd", "c"), 2)])])
    again = [row[0] for row in query(database.reader_url, "SELECT item_id FROM innerloop.recommend('u1', 10)")]
    assert refused not in again
    assert "item-1" not in again
    support = query(
        database.owner_url, "SELECT item_id FROM innerloop.support_sets WHERE user_id = 'u1' ORDER BY position"
    )
    assert support == [("item-1",), ("odd",)]


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_an_adapter_that_diverged_is_thrown_away_and_nobody_else_notices(
    url: str, database: Database, poison: float
) -> None:
    records = log(312)
    well = make_loop(url)
    assign(well)
    feed(well, records[:300], iter([150, 150]))
    users = [row[0] for row in query(database.owner_url, STATE)]
    touched = [json.loads(record.value)["user_id"] for record in records[300:] if record.value != b"{garbage"]  # type: ignore[arg-type]
    victim = next(user for user in users if user in touched)
    sick = well.adaptation.table.slots([victim])
    well.adaptation.table.adapter[sick, 3] = poison
    feed(well, records[300:], iter([12]))
    rows = {row[0]: row for row in query(database.owner_url, STATE)}
    source = "SELECT DISTINCT source FROM innerloop.recommend(%s, 10) WHERE source <> 'popular'"
    assert rows[victim][9] == 3
    assert query(database.reader_url, source, victim) == [("start",)]
    assert query(database.reader_url, "SELECT diverged FROM innerloop.adapters") == [(1,)]
    forget_all(database)
    healthy = make_loop(url)
    assign(healthy)
    feed(healthy, records, iter([150, 150, 12]))
    expected = {row[0]: row for row in query(database.owner_url, STATE)}
    assert {user for user in rows if rows[user] != expected[user]} == {victim}


def test_a_user_without_events_gets_the_popular_list(url: str, database: Database) -> None:
    assign(make_loop(url))
    rows = query(database.reader_url, "SELECT item_id, score, source FROM innerloop.recommend('nobody', 10)")
    assert len(rows) == 10
    assert {row[2] for row in rows} == {"popular"}
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
