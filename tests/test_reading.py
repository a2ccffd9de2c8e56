"""Reading and replaying: what operators see is what the rows and the broker say."""

import hashlib
import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, text

from pipeline import dead_letters, reading, topics
from pipeline.dead_letters import Replayed, Selection
from schemas.database import connect_engine
from tests.brokers import Tansu
from tests.conftest import Database

TOPIC = "interactions"


@pytest.fixture
def stream(broker: Tansu) -> str:
    topics.ensure_topics(broker.address, {TOPIC: {}}, 2)
    return broker.address


def position(writer: Engine, partition: int, *, next_offset: int, **counts: int) -> None:
    names = ", ".join(counts)
    values = ", ".join(f":{name}" for name in counts)
    statement = f"""INSERT INTO innerloop.stream_position (topic, partition, first_offset, next_offset, {names})
        VALUES ('{TOPIC}', :partition, 0, :next_offset, {values})"""  # noqa: S608 - names of this file
    with writer.begin() as connection:
        connection.execute(text(statement), {"partition": partition, "next_offset": next_offset, **counts})


def letter(
    writer: Engine,
    offset: int,
    *,
    payload: bytes | None = b"{",
    reason: str = "BAD_JSON",
    partition: int = 0,
    sha256: str | None = None,
    first_seen: datetime | None = None,
) -> None:
    row = {
        "offset": offset,
        "payload": payload,
        "reason": reason,
        "partition": partition,
        "sha256": sha256 or hashlib.sha256(payload or b"").hexdigest(),
        "first_seen": first_seen or datetime.now(UTC),
    }
    statement = f"""INSERT INTO innerloop.dead_letters
        (topic, partition, "offset", reason, detail, key, payload, sha256, first_seen)
        VALUES ('{TOPIC}', :partition, :offset, :reason, 'why', 'u1', :payload, :sha256, :first_seen)"""  # noqa: S608 - as above
    with writer.begin() as connection:
        connection.execute(text(statement), row)


def values_in(stream: str) -> list[tuple[int, bytes | None, bytes | None]]:
    return sorted((record.partition, record.key, record.value) for record in topics.read_topic(stream, TOPIC))


def versions(writer: Engine) -> list[tuple[str, datetime | None]]:
    """Each letter's row version and time of replay: a row that is written again gets another version."""
    query = text('SELECT xmin::text, replayed_at FROM innerloop.dead_letters ORDER BY "offset"')
    with writer.connect() as connection:
        return [(row[0], row[1]) for row in connection.execute(query)]


def test_lag_is_the_brokers_end_less_the_position(writer: Engine, reader: Engine, stream: str) -> None:
    for offset in range(5):
        letter(writer, offset, payload=b"%d" % offset)
    dead_letters.replay(writer, stream, Selection())  # five records in partition 0, none in partition 1
    position(writer, 0, next_offset=3, applied=1, dead_lettered=2)
    found = reading.status(reader, stream, TOPIC)
    assert [(row.partition, row.end_offset, row.lag) for row in found.partitions] == [(0, 5, 2)]
    assert (found.lag, found.broken, found.monitor) == (2, False, "absent")
    assert (found.dead_letters, found.dead_letters_open) == (5, 0)


def test_a_partition_that_no_worker_has_taken_lags_by_all_it_holds(writer: Engine, reader: Engine, stream: str) -> None:
    letter(writer, 0, partition=1)
    dead_letters.replay(writer, stream, Selection())
    found = reading.status(reader, stream, TOPIC)
    assert (found.partitions, found.lag) == ([], 1)


def test_without_a_broker_the_law_is_still_readable(writer: Engine, reader: Engine) -> None:
    position(writer, 0, next_offset=3, applied=3)
    found = reading.status(reader, None, TOPIC)
    assert [(row.applied, row.lag) for row in found.partitions] == [(3, None)]
    assert (found.lag, found.broker) == (None, "not asked")


def test_freshness_is_taken_from_the_last_minutes_events_alone(writer: Engine, reader: Engine) -> None:
    statement = """INSERT INTO innerloop.prequential
        SELECT 'interactions', 0, :first, :first + 2, to_timestamp(:at), 1, ARRAY[:first, :first + 1]::bigint[],
            ARRAY[:at_ms - 40, :at_ms - 20]::bigint[], ARRAY['u', 'u'], ARRAY[1, 1], ARRAY[2, 2]::smallint[],
            ARRAY[0, 1], ARRAY[1, 1]::real[], ARRAY[1, 1]::real[], ARRAY[1, 1], ARRAY[1, 1], ARRAY[1, 1],
            ARRAY[:at_ms, :at_ms]::bigint[], ARRAY[false, false], ARRAY[0, 0]::smallint[]"""
    now = int(datetime.now(UTC).timestamp())
    assert reading.status(reader, None, TOPIC).freshness is None
    with writer.begin() as connection:
        connection.execute(text(statement), {"first": 0, "at": now - 600, "at_ms": (now - 600) * 1000})
    assert reading.status(reader, None, TOPIC).freshness is None
    with writer.begin() as connection:
        connection.execute(text(statement), {"first": 2, "at": now, "at_ms": now * 1000})
    found = reading.status(reader, None, TOPIC).freshness
    assert found is not None
    assert found.num_events == 2
    assert found.p50_ms == pytest.approx(30)
    assert found.p99_ms == pytest.approx(39.8)


def test_a_user_without_events_gets_the_catalogue(writer: Engine, reader: Engine) -> None:
    with writer.begin() as connection:
        connection.execute(text("INSERT INTO innerloop.items (item_id, text) VALUES ('a', 'A film'), ('b', 'B film')"))
    found = reading.recommend(reader, "nobody'; DROP TABLE innerloop.items; --", 1)
    assert [(item.item_id, item.rank, item.source, item.text) for item in found] == [("a", 1, "popular", "A film")]


def test_letters_are_listed_newest_first_and_by_every_filter(writer: Engine, reader: Engine) -> None:
    now = datetime.now(UTC)
    letter(writer, 1, first_seen=now - timedelta(days=2))
    letter(writer, 2, reason="BAD_ID", first_seen=now - timedelta(hours=1))
    letter(writer, 2, partition=1, first_seen=now)

    def offsets(selection: Selection, limit: int = 10) -> list[tuple[int, int]]:
        found = dead_letters.listed(reader, selection, limit=limit)
        return [(row["partition"], row["offset"]) for row in found]

    assert offsets(Selection()) == [(1, 2), (0, 2), (0, 1)]
    assert offsets(Selection(), limit=1) == [(1, 2)]
    assert offsets(Selection(reason="BAD_ID")) == [(0, 2)]
    assert offsets(Selection(partition=0, offset=1)) == [(0, 1)]
    assert offsets(Selection(since=now - timedelta(days=1))) == [(1, 2), (0, 2)]
    assert offsets(Selection(topic="items")) == []
    assert dead_letters.counted(reader, Selection()) == {"BAD_ID": 1, "BAD_JSON": 2}


def test_a_reader_is_not_shown_what_a_letter_carried(writer: Engine, reader: Engine) -> None:
    letter(writer, 1, payload=b"secret")
    (found,) = dead_letters.listed(reader, Selection(), limit=1)
    assert "secret" not in str(found)
    assert "payload" not in found


def test_a_replayed_letter_is_produced_as_it_was_and_a_second_replay_changes_nothing(
    writer: Engine, reader: Engine, stream: str
) -> None:
    letter(writer, 7, payload=b"\x00not json", partition=1)
    letter(writer, 8, payload=None)
    assert dead_letters.replay(writer, stream, Selection()) == Replayed(2, 0, 0)
    assert values_in(stream) == [(0, b"u1", None), (1, b"u1", b"\x00not json")]
    before = versions(writer)
    assert dead_letters.replay(writer, stream, Selection()) == Replayed(0, 0, 0)
    assert len(values_in(stream)) == 2
    assert versions(writer) == before
    assert dead_letters.listed(reader, Selection(), limit=5) == []
    assert len(dead_letters.listed(reader, Selection(), limit=5, include_replayed=True)) == 2


def test_a_replay_takes_what_was_selected_and_no_more_than_the_limit(writer: Engine, stream: str) -> None:
    for offset in range(6):
        letter(writer, offset, payload=b"%d" % offset, reason="BAD_ID" if offset < 4 else "BAD_JSON")
    assert dead_letters.replay(writer, stream, Selection(reason="BAD_ID"), limit=3).replayed == 3
    assert [value for _, _, value in values_in(stream)] == [b"0", b"1", b"2"]


def test_more_letters_than_one_chunk_are_all_replayed(
    writer: Engine, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "REPLAY_CHUNK", 3)
    for offset in range(8):
        letter(writer, offset, payload=b"%d" % offset, partition=offset % 2)
    assert dead_letters.replay(writer, stream, Selection()).replayed == 8
    assert len({value for _, _, value in values_in(stream)}) == 8


def test_a_letter_that_was_cut_at_64_kib_is_not_replayed(writer: Engine, stream: str) -> None:
    letter(writer, 1, payload=b"x" * 65_536, sha256=hashlib.sha256(b"x" * 70_000).hexdigest())
    assert dead_letters.replay(writer, stream, Selection()) == Replayed(0, 1, 0)
    assert values_in(stream) == []


def test_two_replays_at_once_produce_each_letter_once(
    database: Database, writer: Engine, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "REPLAY_CHUNK", 5)
    for offset in range(60):
        letter(writer, offset, payload=b"%d" % offset)
    replayed: list[int] = []

    def operator() -> None:
        engine = connect_engine(database.writer_url)
        replayed.append(dead_letters.replay(engine, stream, Selection()).replayed)
        engine.dispose()

    operators = [threading.Thread(target=operator) for _ in range(2)]
    for thread in operators:
        thread.start()
    for thread in operators:
        thread.join()
    assert sum(replayed) == 60
    assert len(values_in(stream)) == 60
