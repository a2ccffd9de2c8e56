"""The prequential record: what every applied event leaves in its batch's transaction, and what erasure leaves of it."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import psycopg2
import pytest
import torch

from schemas.event_types import NAMES
from tests.conftest import Database
from tests.factories import NOW_MS, chunk, event, record
from tests.test_loop import assign, feed, fill, log, make_loop, query, sizes

EVENTS = """SELECT "offset", user_id, item_id, type, num_events, new_item, scene,
    (extract(epoch FROM event_time) * 1000)::bigint, loss_adapted > 0, loss_start > 0
    FROM innerloop.prequential_events ORDER BY partition, "offset" """


@pytest.fixture
def url(database: Database) -> str:
    fill(database.owner_url)
    torch.set_num_threads(1)
    return database.writer_url


def changed(url: str, statement: str, *values: Any) -> Any:
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(statement, values)
        connection.commit()
        return cursor.fetchall()[0][0] if cursor.description else None


def test_every_positive_leaves_both_losses_and_its_segments_and_every_other_event_is_counted(
    url: str, database: Database
) -> None:
    loop = make_loop(url)
    assign(loop)
    rows = [
        event("u1", "item-1", "a", "click", context={"scene": "home"}),
        event("u1", "item-2", "b", "impression"),
        event("u1", "item-35", "c", "purchase", context={"scene": "cart"}, ts=NOW_MS - 5000),
        event("u1", "item-3", "d", "dismiss", context={"scene": "home"}),
        event("u2", "odd", "e", "view"),
    ]
    loop.advance([chunk([record(row, offset) for offset, row in enumerate(rows)])])
    assert query(database.reader_url, EVENTS) == [
        (0, "u1", "item-1", "click", 0, False, "home", NOW_MS, True, True),
        (2, "u1", "item-35", "purchase", 1, True, "cart", NOW_MS - 5000, True, True),
        (4, "u2", "odd", "view", 0, True, None, NOW_MS, False, False),  # the catalogue has no such item: no loss
    ]
    counts = query(database.reader_url, "SELECT applied_types FROM innerloop.prequential")[0][0]
    assert {name: count for name, count in zip(NAMES, counts, strict=True) if count} == {
        "impression": 1, "view": 1, "click": 1, "purchase": 1, "dismiss": 1,
    }  # fmt: skip


def test_a_batch_without_positives_leaves_its_counts(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    loop.advance([chunk([record(event("u1", "item-1", "a", "impression"), 0)])])
    rows = query(database.reader_url, "SELECT offsets, applied_types[1] FROM innerloop.prequential")
    assert rows == [([], 1)]


def test_the_record_counts_what_the_law_counts(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(500), sizes(3, 120))
    counted = "SELECT sum(n) FROM innerloop.prequential, unnest(applied_types) AS n"
    applied = query(database.reader_url, "SELECT sum(applied) FROM innerloop.stream_position")
    assert query(database.reader_url, counted) == applied


def test_erasing_a_user_takes_exactly_that_users_elements(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(400), sizes(3, 60))
    before = query(database.reader_url, EVENTS)
    of_user = [row for row in before if row[1] == "u3"]
    assert of_user
    assert changed(url, "SELECT innerloop.erase_prequential('u3')") == len(of_user)
    assert query(database.reader_url, EVENTS) == [row for row in before if row[1] != "u3"]
    assert changed(url, "SELECT innerloop.erase_prequential('u3')") == 0
    for row in {row[1] for row in before}:
        changed(url, "SELECT innerloop.erase_prequential(%s)", row)
    assert query(database.reader_url, EVENTS) == []
