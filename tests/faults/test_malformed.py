"""Inputs that can never be applied, through broker, worker and database: each its own dead letter, the next applied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from kafka import KafkaProducer

from tests.brokers import Tansu
from tests.conftest import Database
from tests.laws.harness import TOPIC, Deploy, Deployment, Worker, lag, query, wait_until
from tests.test_events import MALFORMED, RECORD_MS, message, with_raw, without

LETTERS = 'SELECT "offset", reason, detail, length(payload) FROM innerloop.dead_letters WHERE topic = %s ORDER BY 1'
LAW = """SELECT next_offset, applied, dead_lettered, duplicates, dropped, skipped FROM innerloop.law
    WHERE topic = 'interactions' AND partition = 0"""
SUPPORT = "SELECT item_id FROM innerloop.support_sets WHERE user_id = %s ORDER BY position"
SIX_MIB = 6 * 2**20

Sent = Sequence[tuple[bytes | None, bytes | None]]


def put(broker: str, records: Sent) -> None:
    """(key, value) in this order into partition 0, all at the same Kafka time."""
    with closing(KafkaProducer(bootstrap_servers=broker, acks="all", max_request_size=SIX_MIB)) as producer:
        futures = [
            producer.send(TOPIC, key=key, value=value, partition=0, timestamp_ms=RECORD_MS) for key, value in records
        ]
        for future in futures:
            future.get(timeout=30)


def consume(deployment: Deployment, records: Sent) -> Worker:
    """Have a worker read records, in one batch or two; gives it when it has ended, never having been restarted."""
    put(deployment.broker, records)
    with deployment.worker(batch_events=2048) as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
        assert worker.num_assignments == 1
    return worker


def law(database: Database) -> tuple[Any, ...]:
    return query(database.reader_url, LAW)[0]


def test_every_malformed_record_is_a_dead_letter_with_its_reason_and_the_next_event_is_applied(
    broker: Tansu, deploy: Deploy, database: Database
) -> None:
    missing = {f"no {name}": (without(name), "MISSING_FIELD") for name in ("v", "event_id", "user_id", "item_id", "ts")}
    keyless = {"no key": (message(event_id="keyless"), "KEY_MISMATCH")}
    cases = {**MALFORMED, **missing, **keyless}
    records: list[tuple[bytes | None, bytes | None]] = []
    for number, (name, (value, _)) in enumerate(cases.items()):
        records.append((None if name == "no key" else b"u1", value))
        records.append((b"u1", message(event_id=f"good-{number}", item_id=f"item-{number % 50}")))
    worker = consume(deploy(broker.address), records)
    letters = query(database.owner_url, LETTERS, TOPIC)
    assert [(offset, reason) for offset, reason, _, _ in letters] == [
        (2 * number, reason) for number, (_, reason) in enumerate(cases.values())
    ]
    assert max(length or 0 for *_, length in letters) == 64 * 1024
    assert [detail for _, reason, detail, _ in letters if reason == "MISSING_FIELD"] == [
        f"{name[3:]} is missing" for name in missing
    ]
    assert law(database) == (2 * len(cases), len(cases), len(cases), 0, 0, 0)
    assert not set(worker.log) & {"\x1b", "\x9b", "\0", "\r"}, "what came in must not reach a terminal raw"


def test_a_repeated_event_has_one_effect_and_a_changed_one_is_a_conflict(
    broker: Tansu, deploy: Deploy, database: Database
) -> None:
    first = message(event_id="e", item_id="item-1")
    changed = message(event_id="e", item_id="item-2")
    consume(deploy(broker.address), [(b"u1", value) for value in (first, first, changed, first)])
    assert law(database) == (4, 1, 1, 2, 0, 0)
    assert [row[:2] for row in query(database.owner_url, LETTERS, TOPIC)] == [(2, "CONFLICTING_DUPLICATE")]
    assert query(database.reader_url, SUPPORT, "u1") == [("item-1",)]


def test_hostile_and_unknown_ids_are_stored_letter_by_letter(broker: Tansu, deploy: Deploy, database: Database) -> None:
    odd = ["'; DROP TABLE innerloop.items; --", "../../etc/passwd", "%s", "{}", "\\N", "é€😀", "i" * 128, "item-1"]
    user = "u'; DELETE FROM innerloop.user_state; --"
    records = [
        (user.encode(), message(user_id=user, event_id=f"{item[:100]} {number}", item_id=item))
        for number, item in enumerate(odd)
    ]
    consume(deploy(broker.address), records)
    assert law(database) == (len(odd), len(odd), 0, 0, 0, 0)
    assert query(database.reader_url, SUPPORT, user) == [(item,) for item in odd]
    unknown = query(database.reader_url, "SELECT count(*) FROM innerloop.items WHERE NOT known")
    assert unknown == [(len(odd) - 1,)], "items that the catalogue does not name are kept, and counted as such"


def test_the_last_of_two_equal_keys_wins_and_unknown_fields_do_not_matter(
    broker: Tansu, deploy: Deploy, database: Database
) -> None:
    twice = with_raw("item_id", b'"item-3","item_id":"item-4"')
    records = [(b"u1", twice), (b"u1", message(event_id="e2", item_id="item-5", colour={"of": ["money"]}))]
    consume(deploy(broker.address), records)
    assert law(database) == (2, 2, 0, 0, 0, 0)
    assert query(database.reader_url, SUPPORT, "u1") == [("item-4",), ("item-5",)]


def test_a_burst_of_malformed_records_stops_the_worker_and_dead_letters_nothing_of_it(
    broker: Tansu, deploy: Deploy, database: Database
) -> None:
    deployment = deploy(broker.address)
    good = [(b"u1", message(event_id=f"good-{number}")) for number in range(50)]
    put(broker.address, good)
    with deployment.worker("first") as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
    put(broker.address, [(b"u1", json.dumps({"event": number}).encode()) for number in range(200)])
    with deployment.worker("second", dead_letter_window=100) as worker:
        assert worker.wait() == 78, worker.log
        assert "MISSING_FIELD" in worker.log
        assert "INNERLOOP_DEAD_LETTER_LIMIT" in worker.log
    assert law(database) == (50, 50, 0, 0, 0, 0)
    with deployment.worker("told so", dead_letter_limit=1) as worker:
        wait_until(lambda: lag(deployment) == 0, worker)
    assert law(database) == (250, 50, 200, 0, 0, 0)
