"""A row that the database cannot hold: its event alone is a dead letter, everything else is as if it had never come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline.flood_gate import DeadLetterFlood
from tests.conftest import Database
from tests.factories import Record, chunk, event, record
from tests.test_loop import (
    LAW,
    RECORD,
    STATE,
    assign,
    feed,
    fill,
    forget_all,
    log,
    make_loop,
    query,
    query_write,
    sizes,
)

LETTERS = 'SELECT "offset", reason, detail FROM innerloop.dead_letters WHERE reason = %s ORDER BY 1'
POISON = "poison"
UNLIKED = f"ALTER TABLE innerloop.user_state ADD CONSTRAINT unliked CHECK (user_id <> '{POISON}')"
NOBODY = "ALTER TABLE innerloop.user_state ADD CONSTRAINT nobody CHECK (user_id = '')"


@pytest.fixture
def url(database: Database) -> str:
    fill(database.owner_url)
    torch.set_num_threads(1)
    return database.writer_url


def poisoned(records: Sequence[Record], places: Sequence[int]) -> list[Record]:
    """The log with events of a user, whose row the database refuses, in place of others."""
    found = list(records)
    for place in places:
        found[place] = record(event(POISON, "item-1", f"poison-{place}"), place)
    return found


def rows(database: Database) -> list[Any]:
    return [query(database.owner_url, statement) for statement in (STATE, RECORD)]


@pytest.mark.parametrize(("places", "ahead"), [([70], False), ([0, 1, 150, 299], False), ([0, 1, 150, 299], True)])
def test_a_row_that_violates_a_constraint_costs_its_event_alone(
    places: list[int], ahead: bool, url: str, database: Database
) -> None:
    records = poisoned(log(300), places)
    query_write(database.owner_url, UNLIKED)
    loop = make_loop(url)
    assign(loop)
    feed(loop, records, sizes(1, 200), ahead=ahead)
    letters = query(database.owner_url, LETTERS, "CONSTRAINT")
    assert [offset for offset, *_ in letters] == places
    assert all("unliked" in detail and POISON not in detail for *_, detail in letters)
    found, (law,) = rows(database), query(database.owner_url, LAW)
    assert law[0] == len(records)

    forget_all(database)
    for place in places:  # a twin for whom these are malformed from the beginning
        records[place] = record(b"{garbage", place)
    loop = make_loop(url)
    assign(loop)
    feed(loop, records, sizes(2, 90))
    assert_close(rows(database), found)
    assert query(database.owner_url, LAW) == [law]


def assert_close(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(wanted, abs=1e-6) if isinstance(wanted, float) else wanted)


def test_a_database_that_refuses_every_row_stops_the_worker(url: str, database: Database) -> None:
    query_write(database.owner_url, NOBODY)
    loop = make_loop(url, limit=(0.5, 100))
    assign(loop)
    with pytest.raises(DeadLetterFlood, match="CONSTRAINT"):
        feed(loop, log(300), sizes(1, 150))
    assert len(query(database.owner_url, LETTERS, "CONSTRAINT")) < 120


def test_an_item_that_violates_a_constraint_costs_its_record_alone(url: str, database: Database) -> None:
    query_write(database.owner_url, "ALTER TABLE innerloop.items ADD CONSTRAINT unliked CHECK (text <> 'bad')")
    loop = make_loop(url)
    loop.take_over({("items", 0): (0, 10)})
    texts = ["good", "bad", "better", "bad", "best"]
    records = [
        Record("items", 0, offset, 0, b"new-%d" % offset,
               json.dumps({"v": 1, "item_id": f"new-{offset}", "text": text}).encode())
        for offset, text in enumerate(texts)
    ]  # fmt: skip
    loop.advance([chunk(records)])
    stored = "SELECT item_id FROM innerloop.items WHERE item_id LIKE 'new-%%' AND known ORDER BY 1"
    assert query(database.owner_url, stored) == [("new-0",), ("new-2",), ("new-4",)]
    assert [offset for offset, *_ in query(database.owner_url, LETTERS, "CONSTRAINT")] == [1, 3]
