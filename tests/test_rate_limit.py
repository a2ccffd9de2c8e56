"""One user who sends too much: what is over the limit is dropped and counted, whatever the batches and restarts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.rate_limit import RateLimit
from tests.conftest import Database
from tests.factories import NOW_MS, Record, event
from tests.test_loop import LOSSES, RECORD, STATE, assign, feed, fill, forget_all, make_loop, query, sizes

LIMIT = 20
COUNTS = "SELECT next_offset, applied, dropped, rate_limited, duplicates FROM innerloop.law"


def admitted(times_ms: Sequence[int], events: int = LIMIT) -> list[bool]:
    """Whether a user's events at these times are admitted, one after the other."""
    limit, due, found = RateLimit(events), 0, []
    for at_ms in times_ms:
        found.append(limit.admits(due, at_ms * 1000))
        due = limit.after(due, at_ms * 1000) if found[-1] else due
    return found


def test_a_burst_passes_and_is_regained_over_a_minute() -> None:
    assert admitted([NOW_MS] * 25) == [True] * LIMIT + [False] * 5
    assert sum(admitted([NOW_MS] * 25 + [NOW_MS + 30_000] * 25)) == LIMIT + LIMIT // 2
    assert sum(admitted([NOW_MS] * 25 + [NOW_MS + 60_000] * 25)) == 2 * LIMIT
    assert all(admitted([NOW_MS + 3000 * number for number in range(200)])), "a steady rate at the limit passes"


def test_a_record_from_the_future_does_not_hold_its_user_up_until_then() -> None:
    day = 86_400_000
    assert all(admitted([NOW_MS, NOW_MS + day, NOW_MS + 1, NOW_MS + 2]))
    assert sum(admitted([NOW_MS + day] + [NOW_MS] * 50)) == 1 + LIMIT


def test_suspected_is_exactly_who_is_over_the_limit_once() -> None:
    draw, sizes_of_suspects = np.random.default_rng(3), set[int]()
    for spread_ms in (1_000, 100_000, 220_000, 400_000):
        slots, times = draw.integers(0, 8, 200), NOW_MS + np.sort(draw.integers(0, spread_ms, 200))
        suspects = RateLimit(LIMIT).suspects(np.zeros(8, np.int64), slots, times)
        assert suspects == {slot for slot in range(8) if not all(admitted(times[slots == slot].tolist()))}
        sizes_of_suspects.add(len(suspects))
    assert len(sizes_of_suspects) > 1


@pytest.fixture
def url(database: Database) -> str:
    fill(database.owner_url)
    torch.set_num_threads(1)
    return database.writer_url


def flooded(num_events: int) -> list[Record]:
    """Every second event is one user's, ten of them a second; some are sent twice. The others are sixty users'."""
    draw, rows = np.random.default_rng(1), list[Record]()
    for offset in range(num_events):
        flood = offset % 2 == 0
        user = "flood" if flood else f"u{draw.integers(60)}"
        number = offset - 20 if flood and draw.random() < 0.1 and offset > 20 else offset
        value = event(user, f"item-{number % 40}", f"e-{number}")
        rows.append(Record("interactions", 0, offset, NOW_MS + 50 * offset, user.encode(), value))
    return rows


def limited_loop(url: str, *, events: int = LIMIT, capacity: int = 500) -> Any:
    loop = make_loop(url, capacity=capacity)
    loop.adaptation.table.rate_limit = RateLimit(events) if events else None
    assign(loop)
    return loop


def test_what_is_over_the_limit_is_dropped_and_counted_however_the_log_is_cut(url: str, database: Database) -> None:
    records, found = flooded(1200), []
    # 12 slots: evicted and loaded again; restarts in between
    for cut, capacity in ((sizes(1, 300), 500), (sizes(2, 11), 12), (sizes(3, 1), 500)):
        for start in range(0, len(records), 400):
            feed(limited_loop(url, capacity=capacity), records[start : start + 400], cut)
        found.append([query(database.owner_url, statement) for statement in (COUNTS, RECORD, LOSSES, STATE)])
        forget_all(database)
    (counts,) = found[0][0]
    _, applied, dropped, rate_limited, duplicates = counts
    assert rate_limited == dropped
    assert dropped > 400
    assert duplicates > 0
    assert 600 + LIMIT <= applied <= 600 + 2 * LIMIT + 1  # 60 seconds: a burst, and as many again
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert [row[:5] for row in other[1]] == [row[:5] for row in found[0][1]]
        np.testing.assert_allclose(np.array(other[2]), np.array(found[0][2]), atol=1e-5)
        assert [row[:6] for row in other[3]] == [row[:6] for row in found[0][3]]


def test_who_floods_costs_the_others_no_more_than_the_limit(url: str, database: Database) -> None:
    records = flooded(600)
    feed(limited_loop(url), records, sizes(1, 300))
    learnt = "SELECT count(*) FROM innerloop.prequential_events WHERE user_id = 'flood'"
    ((limited,),) = query(database.owner_url, learnt)
    assert limited <= LIMIT + LIMIT // 2 + 1, "rounds of the inner loop that the others wait for"
    forget_all(database)
    feed(limited_loop(url, events=0), records, sizes(1, 300))
    ((unlimited,),) = query(database.owner_url, learnt)
    assert unlimited > 250


def test_an_event_that_was_over_the_limit_can_be_sent_again(url: str, database: Database) -> None:
    loop = limited_loop(url, events=2)
    value = [event("u", f"item-{number}", f"e-{number}") for number in range(3)]
    times = [NOW_MS, NOW_MS, NOW_MS, NOW_MS + 60_000, NOW_MS + 60_001]
    rows = [Record("interactions", 0, place, times[place], b"u", value[number])
            for place, number in enumerate((0, 1, 2, 2, 2))]  # fmt: skip
    feed(loop, rows, sizes(1, 5))
    assert query(database.owner_url, COUNTS) == [(5, 3, 1, 1, 1)]
