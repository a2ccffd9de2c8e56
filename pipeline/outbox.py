"""Sending to a topic with kafka-python: every record is confirmed by the broker or counted as failed."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

from kafka import KafkaProducer
from kafka.errors import KafkaError

from pipeline.broker import hosts
from pipeline.topics import TopicMissing, connecting, partition_counts

MAX_OUTSTANDING = 20_000  # records sent but not confirmed: bounds memory when the broker is slower than the file
LINGER_MS = 5


class Outbox:
    """A producer for one topic: acks=all and idempotent, keys to partitions by Kafka's murmur2.

    `delivered` counts confirmed records, `failures` maps a record's number to the reason why it was not accepted.
    Raises TopicMissing and BrokerUnavailable when it is opened.
    """

    def __init__(self, broker: str, topic: str) -> None:
        if topic not in partition_counts(broker, [topic]):
            raise TopicMissing(f"topic {topic} does not exist on {hosts(broker)}: run `innerloop migrate`")
        self.topic = topic
        self.delivered = 0
        self.failures: dict[int, str] = {}
        self._free = threading.Semaphore(MAX_OUTSTANDING)
        self._producer = connecting(
            broker,
            KafkaProducer,
            acks="all",
            linger_ms=LINGER_MS,
            batch_size=128 * 1024,
            delivery_timeout_ms=60_000,
            request_timeout_ms=20_000,
            allow_auto_create_topics=False,
        )

    def send(
        self,
        number: int,
        key: bytes | None,
        value: bytes | None,
        partition: int | None = None,
        *,
        timestamp_ms: int | None = None,
    ) -> None:
        """Queue one record; blocks while MAX_OUTSTANDING are unconfirmed. `number` is what a failure is filed under.

        `timestamp_ms` is Kafka's time of the record; now, unless it is given.
        """
        self._free.acquire()
        try:
            future = self._producer.send(
                self.topic, value=value, key=key, partition=partition, timestamp_ms=timestamp_ms
            )
        except KafkaError as error:
            self._failed(number, error)
            return
        future.add_callback(self._confirmed)
        future.add_errback(lambda error: self._failed(number, error))

    def flush(self) -> None:
        """Wait until every queued record is confirmed or has failed."""
        self._producer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.flush()
        self.close()

    def close(self) -> None:
        """Close the connection; what was not flushed may be lost."""
        self._producer.close(timeout=5)

    def _confirmed(self, _metadata: Any) -> None:
        self.delivered += 1  # by the one sender thread only
        self._free.release()

    def _failed(self, number: int, error: BaseException) -> None:
        self.failures[number] = str(error)
        self._free.release()
