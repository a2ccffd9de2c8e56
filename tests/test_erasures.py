"""Users who ask to be forgotten: what is deleted, what a worker's memory may not bring back, what becomes of events."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
import torch

from pipeline import topics
from pipeline.dead_letters import Selection, replay
from pipeline.erasures import Erased, Erasures, WishesLost, ask
from pipeline.forgotten import user_hash
from pipeline.outbox import Outbox
from pipeline.session import SESSION, Session
from schemas.database import connect_engine
from tests.brokers import Tansu
from tests.conftest import Database
from tests.factories import NOW_MS, Record, chunk, event, record
from tests.test_loop import STATE, assign, feed, fill, forget_all, log, make_loop, query, query_write, sizes

WISH_MS = NOW_MS + 10_000
OF_USER = {
    "user_state": "SELECT 1 FROM innerloop.user_state WHERE user_id = 'u0'",
    "scores": "SELECT 1 FROM innerloop.scores WHERE user_id = 'u0'",
    "event_ids": "SELECT 1 FROM innerloop.event_ids WHERE user_id = 'u0'",
    "seen_items": "SELECT 1 FROM innerloop.seen_items WHERE user_id = 'u0'",
    "record": "SELECT 1 FROM innerloop.prequential_events WHERE user_id = 'u0'",
    "dead letters": "SELECT 1 FROM innerloop.dead_letters WHERE key = 'u0' OR position('\"u0\"'::bytea IN payload) > 0",
}
FATES = (
    "SELECT next_offset, applied, dropped, dead_lettered FROM innerloop.stream_position WHERE topic = 'interactions'"
)


@pytest.fixture
def url(database: Database) -> str:
    fill(database.owner_url)
    torch.set_num_threads(1)
    return database.writer_url


def later(user: str, item: str, number: int, offset: int, *, ts: int = WISH_MS + 60_000, at: int = 0) -> Record:
    """An event after the wish, by its own time and by Kafka's unless said otherwise."""
    value = event(user, item, f"later-{number}", ts=ts)
    return Record("interactions", 0, offset, at or WISH_MS + 60_000, user.encode(), value)


def forget(url: str, user: str, at_ms: int = WISH_MS) -> Any:
    """As the topic's reader does, with a worker's rights."""
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT key FROM innerloop.erasure_key")
        ((key,),) = cursor.fetchall()
        cursor.execute("SELECT innerloop.forget_user(%s, %s, %s, 'interactions')",
                       (user, user_hash(bytes(key), user), at_ms))  # fmt: skip
        ((had_state,),) = cursor.fetchall()
        cursor.execute("SELECT innerloop.erase_prequential(%s::text[]), innerloop.erase_dead_letters(%s::text[])",
                       ([user], [user]))  # fmt: skip
        connection.commit()
        return had_state


def follow(loop: Any) -> None:
    loop.follow(force=True)


def test_of_a_forgotten_user_only_a_keyed_hash_is_left_and_nobody_else_is_touched(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(1500), sizes(1, 300))
    loop.advance([chunk([record(b'{"user_id": "u0", "v": 1}', 1500), record(b'{"user_id": "u0"', 1501, key=b"u9")])])
    assert all(query(database.owner_url, statement) for statement in OF_USER.values()), "nothing to forget"
    before = [row for row in query(database.owner_url, STATE) if row[0] != "u0"]
    assert forget(url, "u0") is True
    assert {name for name, statement in OF_USER.items() if query(database.owner_url, statement)} == set()
    assert query(database.owner_url, STATE) == before
    ((number, at_ms, size),) = query(
        database.owner_url, "SELECT erasure, erased_ms, length(user_hash) FROM innerloop.erased_users"
    )
    assert (number, at_ms, size) == (1, WISH_MS, 16)
    ((subject,),) = query(database.owner_url, "SELECT subject FROM innerloop.audit WHERE action = 'forget'")
    assert len(subject) == len("user ") + 32, "a hash, and no name"
    kind = "SELECT value, from_offset FROM innerloop.activations WHERE kind = 'erasure'"
    assert query(database.owner_url, kind) == [(1, 1502)]


@pytest.mark.parametrize("restarted", [False, True])
def test_sequences_of_pairs_are_gone_with_the_epoch_in_which_the_wish_came(
    restarted: bool, url: str, database: Database
) -> None:
    oldest = "SELECT min(first_offset) FROM innerloop.pair_log"
    records = log(1100) + later_clicks(1100, 2300)
    loop = make_loop(url)
    assign(loop)
    feed(loop, records[:1100], sizes(1, 90))
    assert query(database.owner_url, oldest)[0][0] < 1024
    forget(url, "u0")
    if restarted:
        loop = make_loop(url)
        assign(loop)
    follow(loop)
    feed_from(loop, records[1100:2040], sizes(2, 90))
    assert query(database.owner_url, oldest)[0][0] < 1024, "they count in a restart until the epoch ends"
    feed_from(loop, records[2040:], sizes(3, 90))
    assert query(database.owner_url, oldest)[0][0] >= 2048


def later_clicks(start: int, end: int) -> list[Record]:
    """Clicks of a few users after the wish."""
    return [later(f"u{n % 5 + 1}", f"item-{n % 40}", n, n) for n in range(start, end)]


def test_what_a_worker_has_in_memory_does_not_bring_a_user_back(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(300), sizes(1, 60))
    forget(url, "u0")
    follow(loop)
    loop.advance([chunk([later("u0", "item-3", 0, 300)])])
    state = "SELECT num_events, num_applied, num_seen FROM innerloop.user_state WHERE user_id = 'u0'"
    assert query(database.owner_url, state) == [(1, 1, 1)]


@pytest.mark.parametrize("moment", ["before it is computed", "after it was computed"])
def test_a_batch_in_flight_is_computed_again_as_for_a_new_user(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(300), sizes(1, 60))
    step = "load_users" if moment == "before it is computed" else "write"
    if step == "load_users":
        loop.adaptation.table.forget(["u1"])  # somebody is to be loaded, so that the step is taken
    original, wishes = getattr(loop.store, step), iter([True])

    def interrupted(*arguments: Any) -> Any:
        if next(wishes, False):
            forget(url, "u0")
        return original(*arguments)

    monkeypatch.setattr(loop.store, step, interrupted)
    loop.advance([chunk([later("u1", "item-2", 1, 300), later("u0", "item-3", 0, 301)])])
    state = "SELECT num_events, num_applied, num_seen FROM innerloop.user_state WHERE user_id = 'u0'"
    assert query(database.owner_url, state) == [(1, 1, 1)]
    assert query(database.owner_url, FATES)[0][0] == 302


def test_late_events_of_a_forgotten_user_are_dropped_and_counted(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(200), sizes(1, 60))
    _, applied, dropped, dead = query(database.owner_url, FATES)[0]
    assert dropped == 0
    forget(url, "u0")
    follow(loop)
    rows = [
        later("u0", "item-1", 0, 200, ts=WISH_MS - 5),  # happened before, came late
        later("u0", "item-2", 1, 201, at=WISH_MS),  # recorded before
        later("u1", "item-3", 2, 202, ts=WISH_MS - 5),  # somebody else
    ]
    loop.advance([chunk(rows)])
    assert query(database.owner_url, FATES) == [(203, applied + 1, 2, dead)]
    assert query(database.owner_url, OF_USER["user_state"]) == []
    assert "u0" not in loop.adaptation.table.users()


def test_what_a_worker_still_remembers_decides_no_event_of_a_forgotten_user(url: str, database: Database) -> None:
    loop = make_loop(url)
    assign(loop)
    first = [record(event("u0", f"item-{number}", f"e{number}"), number) for number in range(4)]
    loop.advance([chunk(first)])
    forget(url, "u0")
    # The same events once more: duplicates to who remembers, from before the wish to who does not.
    again = [Record("interactions", 0, 4 + n, WISH_MS + 99, row.key, row.value) for n, row in enumerate(first)]
    loop.advance([chunk(again)])
    assert query(database.owner_url, FATES) == [(8, 4, 4, 0)]


def interleaved(cut: Callable[[], Iterator[int]], url: str, database: Database) -> list[Any]:
    """The state after a log with a wish at offset 150, and events of both sides of it afterwards."""
    loop = make_loop(url, capacity=14)
    assign(loop)
    feed(loop, log(150), cut())
    forget(url, "u0")
    draw = random.Random(2)
    rows = [
        later(f"u{draw.randrange(4)}", f"item-{draw.randrange(40)}", n, n, ts=WISH_MS + draw.choice([-50, 50]))
        for n in range(150, 400)
    ]
    feed_from(loop, rows, cut())
    law = "SELECT next_offset, applied, dead_lettered, duplicates, dropped, skipped FROM innerloop.stream_position"
    return [query(database.owner_url, statement) for statement in (STATE, law)]


def feed_from(loop: Any, rows: list[Record], cut: Iterator[int]) -> None:
    while rows:
        size = next(cut)
        loop.advance([chunk(rows[:size])])
        rows = rows[size:]


def test_with_the_same_erasures_the_same_log_gives_the_same_rows_however_it_is_cut(
    url: str, database: Database
) -> None:
    found = []
    for cut in (lambda: sizes(1, 120), lambda: sizes(2, 9)):
        found.append(interleaved(cut, url, database))
        forget_all(database)
        query_write(database.owner_url, "TRUNCATE innerloop.erased_users")
    assert found[0][1][0][4] > 20, "some events must be dropped"
    (states, law), (other_states, other_law) = found
    assert law == other_law
    for row, other in zip(states, other_states, strict=True):
        # matrix products of a few rows round otherwise than those of many
        for value, same in zip(row, other, strict=True):
            assert value == (pytest.approx(same, abs=1e-6) if isinstance(same, list | float) else same)


def test_forgetting_somebody_unknown_is_fine_and_leaves_one_line_of_audit(url: str, database: Database) -> None:
    assert [forget(url, "nobody", at_ms) for at_ms in (WISH_MS, WISH_MS, WISH_MS + 1)] == [False, None, False]
    assert query(database.owner_url, "SELECT action FROM innerloop.audit") == [("forget",)]
    assert query(database.owner_url, "SELECT erasure, erased_ms FROM innerloop.erased_users") == [(2, WISH_MS + 1)]


def test_readers_cannot_forget_and_see_no_key(url: str, database: Database) -> None:
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        forget(database.reader_url, "u0")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        query(database.reader_url, "SELECT innerloop.forget_user('u0', '', 0, 'interactions')")


@pytest.fixture
def wishes(broker: Tansu, url: str) -> Iterator[Erasures]:
    topics.ensure_topics(broker.address, {"erasures": topics.NEVER_EXPIRING, "interactions": {}}, 2)
    engine = connect_engine(url, options=SESSION)
    yield Erasures(Session(engine), broker.address, topic="erasures", interactions="interactions")
    engine.dispose()


POSITIONS = """SELECT sum(next_offset), sum(applied), sum(dead_lettered) FROM innerloop.stream_position
    WHERE topic = 'erasures'"""


def test_every_wish_of_the_topic_is_granted_once_and_bad_ones_become_dead_letters(
    wishes: Erasures, broker: Tansu, url: str, database: Database
) -> None:
    assert wishes.catch_up() == Erased()
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(200), sizes(1, 60))
    for user in ("u0", "u1", "nobody"):
        ask(broker.address, "erasures", user)
    with Outbox(broker.address, "erasures") as outbox:
        outbox.send(0, b"u2", b'{"v": 1, "user_id": "u3", "requested_at": 1760000000000}')
    done = wishes.catch_up()
    assert done.users == 2
    assert done.predictions > 10
    assert query(database.owner_url, POSITIONS) == [(4, 3, 1)]
    assert query(database.owner_url, "SELECT reason FROM innerloop.dead_letters WHERE topic = 'erasures'") == [
        ("KEY_MISMATCH",)
    ]
    users = {row[0] for row in query(database.owner_url, "SELECT user_id FROM innerloop.user_state")}
    assert users.isdisjoint({"u0", "u1"})
    assert {"u2", "u3"} <= users
    assert wishes.catch_up() == Erased()
    assert query(database.owner_url, "SELECT count(*) FROM innerloop.audit WHERE action = 'forget'") == [(3,)]


def test_a_user_who_came_back_stays_when_the_rest_of_a_crashed_erasure_is_done_again(
    wishes: Erasures, broker: Tansu, url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(200), sizes(1, 60))
    ask(broker.address, "erasures", "u0")
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.erasures.reach", lambda _: (_ for _ in ()).throw(RuntimeError("crashed")))
        with pytest.raises(RuntimeError):
            wishes.catch_up()
    assert query(database.owner_url, OF_USER["user_state"]) == []
    assert query(database.owner_url, OF_USER["record"])
    follow(loop)
    ((at_ms,),) = query(database.owner_url, "SELECT erased_ms FROM innerloop.erased_users")
    loop.advance([chunk([later("u0", "item-3", 0, 200, ts=at_ms + 50, at=at_ms + 50)])])
    done = wishes.catch_up()
    assert (done.users, done.predictions > 0) == (0, True)
    assert query(database.owner_url, "SELECT num_applied FROM innerloop.user_state WHERE user_id = 'u0'") == [(1,)]


def test_an_older_backup_forgets_again_and_a_topic_that_lost_wishes_is_refused(
    wishes: Erasures, broker: Tansu, url: str, database: Database
) -> None:
    loop = make_loop(url)
    assign(loop)
    feed(loop, log(200), sizes(1, 60))
    ask(broker.address, "erasures", "u0")
    wishes.catch_up()
    with closing(psycopg2.connect(database.owner_url)) as connection, connection.cursor() as cursor:
        cursor.execute("TRUNCATE innerloop.erased_users")
        cursor.execute("DELETE FROM innerloop.stream_position WHERE topic = 'erasures'")
        cursor.execute("INSERT INTO innerloop.user_state (user_id, partition, last_offset, num_events, num_applied, "
                       "meta_version) VALUES ('u0', 0, 1, 1, 1, 1)")  # fmt: skip
        connection.commit()
    assert wishes.catch_up().users == 1
    assert query(database.owner_url, OF_USER["user_state"]) == []
    with closing(psycopg2.connect(database.owner_url)) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE innerloop.stream_position SET next_offset = next_offset + 9, applied = applied + 9 "
                       "WHERE topic = 'erasures'")  # fmt: skip
        connection.commit()
    with pytest.raises(WishesLost, match="restore the topic"):
        wishes.catch_up()


def test_an_emptied_dead_letter_is_not_sent_again(wishes: Erasures, broker: Tansu, url: str) -> None:
    loop = make_loop(url)
    assign(loop)
    bad = [json.dumps({"v": 9, "user_id": user}).encode() for user in ("u0", "u1")]
    loop.advance([chunk([record(row, offset) for offset, row in enumerate(bad)])])
    forget(url, "u0")
    engine = connect_engine(url)
    done = replay(engine, broker.address, Selection())
    engine.dispose()
    assert (done.replayed, done.incomplete, done.failed) == (1, 0, 0)
    assert [row.key for row in topics.read_topic(broker.address, "interactions")] == [b"u1"]
