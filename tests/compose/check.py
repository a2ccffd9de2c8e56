"""Read the running stack as its users do: SQL as the reader, Kafka's end offsets from outside its network."""

import contextlib
import os
import sys
import time
from typing import Any

import psycopg2
from kafka import KafkaConsumer, TopicPartition

READER_URL = os.environ.get("READER_URL", "postgresql://reader:reader@127.0.0.1:5432/innerloop")
BROKER = os.environ.get("OUTSIDE_BROKER", "127.0.0.1:19092")
PATIENCE_SECONDS = 300.0


def rows(statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    with contextlib.closing(psycopg2.connect(READER_URL)) as connection, connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall()


def end_of_log() -> int:
    """The number of interactions in Kafka, and the law's `next_offset` when nothing is left to do."""
    with contextlib.closing(KafkaConsumer(bootstrap_servers=BROKER)) as consumer:
        partitions = consumer.partitions_for_topic("interactions") or set()
        ends = consumer.end_offsets([TopicPartition("interactions", partition) for partition in partitions])
        return sum(ends.values())


def processed() -> int:
    return int(rows("SELECT coalesce(sum(next_offset), 0) FROM innerloop.law WHERE topic = 'interactions'")[0][0])


def wait_until_everything_is_processed() -> int:
    """Wait until the log has stopped growing and nothing of it is left; returns the number of events."""
    deadline, before = time.monotonic() + PATIENCE_SECONDS, -1
    while time.monotonic() < deadline:
        end = end_of_log()
        print(f"{processed()} of {end} events processed", flush=True)
        if end and end == before == processed():
            return end
        before = end
        time.sleep(5)
    sys.exit("the worker did not finish the stream")


def main() -> None:
    total = wait_until_everything_is_processed()
    broken = rows("SELECT * FROM innerloop.law WHERE broken")
    assert not broken, f"the law is broken: {broken}"
    [(applied,)] = rows("SELECT sum(applied) FROM innerloop.law WHERE topic = 'interactions'")
    assert applied == total, f"{applied} of {total} events applied"
    [(user, num_events)] = rows("SELECT user_id, num_events FROM innerloop.user_state ORDER BY num_events DESC LIMIT 1")
    listed = rows("SELECT item_id, score, rank, source FROM innerloop.recommend(%s, 10)", user)
    for item, score, rank, source in listed:
        print(f"{rank:3} {item:>6} {score:.4f} {source}")
    assert len(listed) == 10
    assert {source for *_, source in listed} <= {"adapted", "start"}, f"user {user} has {num_events} events"
    unknown = rows("SELECT source FROM innerloop.recommend('nobody yet', 5)")
    assert unknown == [("popular",)] * 5, unknown
    print(f"{total} events applied, the law holds, and recommend() answers")


if __name__ == "__main__":
    main()
