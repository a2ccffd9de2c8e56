"""Changing versions under way: between two batches, on the partitions that are meant, with nothing replayed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import psycopg2.errors
import pytest
import torch
from numpy.typing import NDArray

from models.checkpoint import ArtefactRefused
from models.encoder import HashedBagOfWords
from models.meta_parameters import MetaParameters
from pipeline.adaptation import Adaptation, Types
from pipeline.loop import Loop
from pipeline.loop_versions import Sources, StateMaps
from pipeline.session import SESSION
from pipeline.store import Store
from pipeline.support import UserTable
from schemas.database import connect_engine
from schemas.events import parse_interaction
from tests.conftest import Database
from tests.factories import Record, chunk, event, meta_parameters, record
from tests.test_loop import ITEMS, fill, query, query_write

ENCODER = HashedBagOfWords(16)
ONE = meta_parameters(ITEMS[:30], seed=1)
# Version 2 has other inner factors, and more of them.
WIDE = 32
TWO = meta_parameters(
    ITEMS[:35],
    seed=2,
    half_life=500.0,
    item_factors=torch.randn(35, WIDE, generator=torch.Generator().manual_seed(5)),
    residual_mean=torch.zeros(WIDE),
    metric=torch.linspace(1.0, 0.1, WIDE),
    precision=torch.full((WIDE,), 3.0),
    adapter_initial=torch.zeros(WIDE),
    step_rates=torch.zeros(0, WIDE),
    text_map=torch.randn(17, 16 + 4 * 16 + WIDE, generator=torch.Generator().manual_seed(6)) * 0.1,
)
FORWARD: NDArray[np.float64] = np.random.default_rng(0).normal(size=(16, WIDE)).astype(np.float64)
BACK: NDArray[np.float64] = np.linalg.pinv(FORWARD).astype(np.float64)
PREDICTIONS = 'SELECT DISTINCT partition, meta_version, "offset" FROM innerloop.prequential_events ORDER BY 1, 3'
ACTIVE = """SELECT partition, value, from_offset FROM innerloop.activations WHERE kind = 'meta_version'
    ORDER BY partition, from_offset"""


def parameters(version: int) -> MetaParameters:
    if version == 3:
        raise ArtefactRefused("NON_FINITE", "item_out holds NaN or infinity")
    return ONE if version == 1 else TWO


def state_maps(version: int) -> StateMaps:
    return {1: FORWARD} if version == 2 else {2: BACK}


@pytest.fixture
def url(database: Database) -> str:
    fill(database.owner_url)
    for status in ("challenger", "challenger"):
        query_write(
            database.owner_url,
            "INSERT INTO innerloop.meta_versions (status, artefact, sha256, encoder) "  # noqa: S608 - constants
            f"VALUES ('{status}', 'x', 'x', 'test')",
        )
    torch.set_num_threads(1)
    return database.writer_url


def make_loop(url: str, load: Callable[[int], MetaParameters] = parameters, *, capacity: int = 500) -> Loop:
    table = UserTable(capacity, support_size=10, state_size=0, id_horizon=100, seen_horizon=70)
    loop = Loop(
        Store(connect_engine(url, options=SESSION), id_horizon=100, seen_horizon=70),
        Adaptation(table, Types.of({}), top_n=10),
        Sources(load, lambda texts, _: ENCODER.encode(texts), state_maps),
        topics=("interactions", "items"),
        parse=parse_interaction,
        dead_letter_limit=(0.5, 1000),
        accept_data_gap=False,
    )
    loop.wait_for_version()
    loop.take_over({("interactions", partition): (0, 10**6) for partition in range(2)})
    return loop


def clicks(partition: int, start: int, count: int) -> list[Record]:
    """Clicks of six users of a partition."""
    draw = np.random.default_rng(start + partition)
    return [
        record(
            event(f"u{partition}-{draw.integers(6)}", str(draw.choice(ITEMS)), f"e{partition}-{offset}"),
            offset,
            partition=partition,
        )
        for offset in range(start, start + count)
    ]


def advance(loop: Loop, records: Sequence[Record], size: int) -> None:
    for start in range(0, len(records), size):
        loop.advance([chunk(records[start : start + size])])


RETIRE = "UPDATE innerloop.meta_versions SET status = 'retired' WHERE status = 'live'"
STATUS = """UPDATE innerloop.meta_versions SET status = '{}', canary_partitions = '{{1}}', canary_since = now()
    WHERE version = {}"""


def make(url: str, version: int, status: str) -> None:
    """Give versions their statuses as a promotion does, in one transaction."""
    retire = RETIRE + "; " if status == "live" else ""
    query_write(url, retire + STATUS.format(status, version))


def follow_until(loop: Loop, *, live: int | None = None, canary: int | None = None) -> None:
    deadline = time.monotonic() + 60
    while live not in {None, loop.versions.heads.live} or canary not in {None, loop.versions.heads.canary}:
        assert time.monotonic() < deadline
        loop.follow(force=True)


def test_versions_change_at_a_recorded_offset_and_the_batch_in_hand_ends_on_its_own(
    url: str, database: Database
) -> None:
    loop = make_loop(url)
    advance(loop, clicks(0, 0, 40), 20)
    make(database.owner_url, 2, "live")
    loop.follow(force=True)  # begins to load it, in another thread
    advance(loop, clicks(0, 40, 20), 20)
    follow_until(loop, live=2)
    advance(loop, clicks(0, 60, 40), 20)
    assert query(database.owner_url, ACTIVE)[:2] == [(0, 1, 0), (0, 2, 60)]
    versions = {offset: version for _, version, offset in query(database.owner_url, PREDICTIONS)}
    assert versions == {offset: 1 if offset < 60 else 2 for offset in range(100)}
    stated = query(database.owner_url, "SELECT DISTINCT meta_version, cardinality(adapter) FROM innerloop.user_state")
    assert sorted(stated) == [(2, WIDE)]


def test_a_canary_holds_its_partitions_only_until_it_is_live_everywhere(url: str, database: Database) -> None:
    loop = make_loop(url)
    make(database.owner_url, 2, "canary")
    follow_until(loop, canary=2)
    for partition in (0, 1):
        advance(loop, clicks(partition, 0, 30), 30)
    both = [*clicks(0, 30, 10), *clicks(1, 30, 10)]
    loop.advance([chunk(both[:10]), chunk(both[10:])])  # one fetch, two transactions
    make(database.owner_url, 2, "live")
    follow_until(loop, live=2)
    assert query(database.owner_url, ACTIVE) == [(0, 1, 0), (0, 2, 40), (1, 2, 0)]
    found = query(database.owner_url, "SELECT partition, meta_version FROM innerloop.prequential_events GROUP BY 1, 2")
    assert sorted(found) == [(0, 1), (1, 2)]
    law = "SELECT partition, next_offset, applied FROM innerloop.stream_position ORDER BY 1"
    assert query(database.owner_url, law) == [(0, 40, 40), (1, 40, 40)]


def test_a_state_is_carried_over_by_the_map_at_the_users_next_event(url: str, database: Database) -> None:
    loop = make_loop(url)
    advance(loop, clicks(0, 0, 40), 40)
    state = "SELECT adapter, adapter_events, meta_version FROM innerloop.user_state WHERE user_id = 'u0-1'"
    ((before, num_before, _),) = query(database.owner_url, state)
    make(database.owner_url, 2, "live")
    follow_until(loop, live=2)
    assert query(database.owner_url, state)[0][2] == 1, "nothing is replayed"
    # a dismissal touches the user and teaches the inner step nothing
    loop.advance([chunk([record(event("u0-1", ITEMS[3], "no", "dismiss"), 40)])])
    ((after, num_after, version),) = query(database.owner_url, state)
    assert (version, num_after) == (2, num_before)
    assert num_before > 2
    np.testing.assert_allclose(after, np.array(before) @ FORWARD, rtol=1e-5, atol=1e-6)


def test_a_state_without_a_map_begins_anew(url: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_swaps.state_maps", lambda _: {})
    loop = make_loop(url)
    advance(loop, clicks(0, 0, 40), 40)
    make(database.owner_url, 2, "live")
    follow_until(loop, live=2)
    loop.advance([chunk([record(event("u0-1", ITEMS[3], "no", "dismiss"), 40)])])
    state = "SELECT adapter, adapter_events FROM innerloop.user_state WHERE user_id = 'u0-1'"
    ((after, num_after),) = query(database.owner_url, state)
    assert (set(after), num_after) == ({0.0}, 0)


STATE = """SELECT user_id, num_events, adapter_events, meta_version, top_items, adapter, top_scores
    FROM innerloop.user_state ORDER BY user_id"""


def test_with_the_same_activations_the_same_log_gives_the_same_rows_however_it_is_cut(
    services: object, url: str, database: Database
) -> None:
    found = []
    for size, restarts in ((37, False), (5, True)):
        loop = make_loop(url)
        for start, version in ((0, 1), (1200, 2), (1500, 1), (1800, 2)):
            make(database.owner_url, version, "live")
            if restarts:  # another worker, whose table is small: it forgets users, and reads states of either width
                loop = make_loop(url, capacity=13)
            follow_until(loop, live=version)
            advance(loop, clicks(0, start, 300 if start else 1200), size)
        found.append(query(database.owner_url, STATE))
        make(database.owner_url, 1, "live")
        for table in ("user_state", "stream_position", "prequential", "item_statistics", "activations", "event_ids",
                      "seen_items", "popular_items"):  # fmt: skip
            query_write(database.owner_url, f"TRUNCATE innerloop.{table}")
    first, second = found
    assert [row[:5] for row in first] == [row[:5] for row in second]
    for mine, other in zip(first, second, strict=True):
        np.testing.assert_allclose(mine[5], other[5], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mine[6], other[6], rtol=1e-6)


def test_a_version_that_cannot_be_loaded_is_refused_once_and_the_live_one_stays(url: str, database: Database) -> None:
    loop = make_loop(url)
    make(database.owner_url, 3, "live")
    audit = "SELECT actor, action, subject, detail ->> 'reason' FROM innerloop.audit"
    deadline = time.monotonic() + 60
    while not query(database.owner_url, audit):
        assert time.monotonic() < deadline
        loop.follow(force=True)
    advance(loop, clicks(0, 0, 20), 10)
    loop.follow(force=True)
    reason = "NON_FINITE: item_out holds NaN or infinity"
    assert query(database.owner_url, audit) == [("worker", "refuse", "version 3", reason)]
    assert {row[1] for row in query(database.owner_url, PREDICTIONS)} == {1}


def test_a_first_version_that_cannot_be_loaded_ends_the_worker_with_its_reason(url: str, database: Database) -> None:
    make(database.owner_url, 3, "live")
    with pytest.raises(ArtefactRefused, match="NON_FINITE"):
        make_loop(url)


def test_two_live_versions_cannot_be_made_even_for_a_moment(url: str, database: Database) -> None:
    with pytest.raises(psycopg2.errors.UniqueViolation):
        query_write(database.owner_url, "UPDATE innerloop.meta_versions SET status = 'live' WHERE version = 2")


def test_two_canaries_cannot_be_made_even_for_a_moment(url: str, database: Database) -> None:
    make(database.owner_url, 2, "canary")
    with pytest.raises(psycopg2.errors.UniqueViolation):
        make(database.owner_url, 3, "canary")


def test_a_partition_taken_over_gets_no_older_version_than_it_had(url: str, database: Database) -> None:
    slow = make_loop(url)
    fast = make_loop(url)
    make(database.owner_url, 2, "live")
    follow_until(fast, live=2)
    advance(fast, clicks(0, 0, 20), 20)
    slow.take_over({("interactions", 0): (0, 10**6)})
    advance(slow, clicks(0, 20, 20), 20)
    assert [row for row in query(database.owner_url, ACTIVE) if row[0] == 0] == [(0, 2, 0)]


def test_a_worker_that_has_lost_all_partitions_follows_versions_and_leaves_them_alone(
    url: str, database: Database
) -> None:
    idle, busy = make_loop(url), make_loop(url)
    idle.take_over({})
    advance(busy, clicks(0, 0, 20), 20)
    make(database.owner_url, 2, "live")
    follow_until(idle, live=2)  # would be fenced at the offset that it knows
    assert {version for _, version, _ in query(database.owner_url, ACTIVE)} == {1}
