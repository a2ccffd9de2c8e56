"""What must be in the database, computed twice from the log as it lies in the broker.

The fates in plain Python; users, scores and predictions by one undisturbed loop over a database of its own (the twin).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline import arithmetic, topics
from pipeline.chunks import Chunk, Record
from pipeline.session import SESSION
from pipeline.settings import Settings
from pipeline.synthetic_messages import Message
from pipeline.worker import build_loop
from schemas.database import connect_engine
from tests.conftest import Database
from tests.laws.harness import NUM_PARTITIONS, TOPIC, Deployment, fill_catalogue, query
from tests.laws.launcher import short_epochs

LAW = """SELECT partition, first_offset, next_offset, applied, dead_lettered, duplicates, dropped, skipped, broken
    FROM innerloop.law WHERE topic = 'interactions' ORDER BY partition"""
DEAD = 'SELECT partition, "offset", reason FROM innerloop.dead_letters WHERE topic = %s ORDER BY 1, 2'


def assert_law(deployment: Deployment, sent: Iterable[Message]) -> list[Record]:
    """Counters, dead letters and positions are those that plain reasoning over the broker's log gives; returns it."""
    sent = list(sent)
    log = list(topics.read_topic(deployment.broker, TOPIC))
    assert Counter(record.value for record in log) == Counter(message.value for message in sent), "the feeder is wrong"
    malformed = {message.value: message.fate for message in sent if message.fate not in {"applied", "duplicate"}}
    counts, dead = _fates(log, malformed)
    ends = topics.end_offsets(deployment.broker, TOPIC)
    expected = [
        (partition, 0, ends[partition], tally["applied"], tally["dead"], tally["duplicate"], 0, 0, False)
        for partition, tally in sorted(counts.items())
    ]
    assert query(deployment.database.reader_url, LAW) == expected
    assert query(deployment.database.owner_url, DEAD, TOPIC) == dead
    return log


def _fates(
    log: Sequence[Record], malformed: Mapping[bytes, str]
) -> tuple[dict[int, Counter[str]], list[tuple[int, int, str]]]:
    counts: dict[int, Counter[str]] = {partition: Counter() for partition in range(NUM_PARTITIONS)}
    dead, known = [], defaultdict[str, set[str]](set)
    for record in sorted(log, key=lambda record: (record.partition, record.offset)):
        value = record.value or b""
        if value in malformed:
            counts[record.partition]["dead"] += 1
            dead.append((record.partition, record.offset, malformed[value]))
            continue
        body = json.loads(value)
        repeated = body["event_id"] in known[body["user_id"]]
        counts[record.partition]["duplicate" if repeated else "applied"] += 1
        known[body["user_id"]].add(body["event_id"])
    return counts, dead


USERS = """SELECT user_id, partition, last_offset, num_events, num_applied, support_items, support_types,
    adapter_events, meta_version, top_items, recent_ids, recent_seen, num_seen, adapter, top_scores
    FROM innerloop.user_state ORDER BY user_id"""
PREDICTIONS = """SELECT partition, "offset", user_id, item_id, type, num_events, rank_adapted, rank_start, rank_popular,
    loss_adapted, loss_start FROM innerloop.prequential_events ORDER BY 1, 2"""
POPULAR = "SELECT partition, item_nos, scores FROM innerloop.popular_items ORDER BY 1"
ACTIVATIONS = "SELECT partition, kind, value, from_offset FROM innerloop.activations ORDER BY 1, 2, 4"


def assert_as_twin(deployment: Deployment, log: Sequence[Record], twin: Database) -> None:
    """One loop that nothing disturbs, over the same log in another cut, leaves the same rows in a fresh database."""
    deployment.publish(twin)
    fill_catalogue(twin)
    replay(deployment, log, twin)
    mine, other = deployment.database.owner_url, twin.owner_url
    for statement, num_floats in ((LAW, 0), (ACTIVATIONS, 0), (USERS, 2), (PREDICTIONS, 2), (POPULAR, 1)):
        _assert_equal(query(mine, statement), query(other, statement), num_floats)
    assert query(mine, DEAD, TOPIC) == query(other, DEAD, TOPIC)


def _assert_equal(mine: list[tuple[Any, ...]], other: list[tuple[Any, ...]], num_floats: int) -> None:
    """The last `num_floats` columns to 1e-6, the others exactly."""
    assert len(mine) == len(other)
    for row, wanted in zip(mine, other, strict=True):
        split = len(row) - num_floats
        assert row[:split] == wanted[:split]
        for got, value in zip(row[split:], wanted[split:], strict=True):
            np.testing.assert_allclose(np.array(got, float), np.array(value, float), rtol=1e-6, atol=1e-6)


@short_epochs()
def replay(deployment: Deployment, log: Sequence[Record], database: Database) -> None:
    """Put the whole log through a loop in this process."""
    arithmetic.prepare(1)
    engine = connect_engine(database.writer_url, options=SESSION)
    names = {name.removeprefix("INNERLOOP_").lower(): value for name, value in deployment.settings().items()}
    loop = build_loop(Settings.load(**names), engine)
    loop.wait_for_version()
    ends = {(TOPIC, partition): (0, 10**9) for partition in range(NUM_PARTITIONS)}
    loop.take_over(ends)
    for partition in range(NUM_PARTITIONS):
        for chunk in _chunks([record for record in log if record.partition == partition]):
            loop.advance([chunk])
    loop.store.close()
    engine.dispose()


def _chunks(log: Sequence[Record], size: int = 777) -> Iterator[Chunk]:
    for start in range(0, len(log), size):
        rows = log[start : start + size]
        yield Chunk(TOPIC, rows[0].partition, rows[0].offset, rows[-1].offset + 1, rows)


TABLES = ("user_state", "event_ids", "seen_items", "prequential", "dead_letters", "item_statistics", "activations")
POSITIONS = """SELECT topic, partition, first_offset, next_offset, applied, dead_lettered, duplicates, dropped, skipped
    FROM innerloop.stream_position ORDER BY 1, 2"""


def contents(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that was derived from the stream, to the last bit and timestamp."""
    everything = "SELECT t::text FROM innerloop.{} t ORDER BY 1"
    rows = {name: query(database.owner_url, everything.format(name)) for name in TABLES}
    return rows | {"stream_position": query(database.owner_url, POSITIONS)}
