"""The topics: made by `migrate` and by nothing else, measured for lag, read to their end for meta-training.

kafka-python inspects and feeds; it never sits in the worker's path (15k events/s where aiokafka does 300k).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, TopicAlreadyExistsError, UnknownTopicOrPartitionError, for_code

from pipeline.broker import Broker, hosts
from pipeline.chunks import Record
from schemas.errors import ConfigurationError

COMPACTED = {"cleanup.policy": "compact"}
NEVER_EXPIRING = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
_FETCH_WAIT_MS = 50  # Tansu answers an idle long poll late, Apache Kafka is the same at any value


class BrokerUnavailable(Exception):
    """No broker answered: check INNERLOOP_BROKER and that it runs, then try again."""


class TopicMissing(ConfigurationError):
    """A topic does not exist: run `innerloop migrate`, which makes the topics."""


class PartitionsDiffer(ConfigurationError):
    """A topic has other partitions than the setting: users live in partitions, so their number never changes."""


class _TopicNames(Protocol):
    @property
    def topic_interactions(self) -> str: ...
    @property
    def topic_items(self) -> str: ...
    @property
    def topic_erasures(self) -> str: ...
    @property
    def partitions(self) -> int: ...


def topic_configs(settings: _TopicNames) -> dict[str, Mapping[str, str]]:
    """Return the broker-side settings of each topic that innerloop uses."""
    return {
        settings.topic_interactions: {},
        settings.topic_items: COMPACTED,
        settings.topic_erasures: NEVER_EXPIRING,
    }


def ensure_topics(broker: str, configs: Mapping[str, Mapping[str, str]], partitions: int) -> list[str]:
    """Make the missing topics and return their names; existing ones are checked, never altered.

    Raises PartitionsDiffer when one exists with another number of partitions, BrokerUnavailable without a broker.
    """
    with _Admin(broker) as admin:
        present = _partition_counts(admin, configs)
        missing = [topic for topic in configs if topic not in present]
        _refuse_other_partitions(present, partitions)
        for topic in missing:
            _create(admin, topic, configs[topic], partitions)
    # Two concurrent migrates may both have seen it missing: what exists now is what counts.
    check_topics(broker, configs, partitions)
    return missing


def check_topics(broker: str, topics: Iterable[str], partitions: int) -> None:
    """Raise TopicMissing or PartitionsDiffer unless every topic exists with that many partitions."""
    names = list(topics)
    present = partition_counts(broker, names)
    missing = [topic for topic in names if topic not in present]
    if missing:
        raise TopicMissing(f"topic {', '.join(missing)} does not exist on {hosts(broker)}: run `innerloop migrate`")
    _refuse_other_partitions(present, partitions)


def check_access(broker: str, topics: Iterable[str], group: str) -> None:
    """Raise kafka-python's authorisation error unless records of the topics can be read and the group be joined."""
    for topic in topics:
        end_offsets(broker, topic)
        with contextlib.closing(
            connecting(broker, KafkaConsumer, group_id=group, enable_auto_commit=False)
        ) as consumer:
            consumer.committed(TopicPartition(topic, 0))


def partition_counts(broker: str, topics: Iterable[str]) -> dict[str, int]:
    """Return the number of partitions of each of `topics` that exists."""
    with _Admin(broker) as admin:
        return _partition_counts(admin, topics)


def end_offsets(broker: str, topic: str) -> dict[int, int]:
    """Return each partition's end offset (that of the next record to be written).

    Taken from the high watermark of a fetch: Tansu 0.6 answers ListOffsets(latest) with the base offset of the last
    batch plus one, which is too low whenever that batch holds more than one record.
    """
    with _consuming(broker, topic) as (consumer, partitions):
        listed = consumer.end_offsets(partitions)
        return {tp.partition: _high_watermark(consumer, tp, listed[tp]) for tp in partitions}


def beginning_offsets(broker: str, topic: str) -> dict[int, int]:
    """Return each partition's first offset that the broker still has."""
    with _consuming(broker, topic) as (consumer, partitions):
        return {tp.partition: offset for tp, offset in consumer.beginning_offsets(partitions).items()}


def read_topic(
    broker: str,
    topic: str,
    *,
    since_ms: int | None = None,
    starts: Mapping[int, int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Record]:
    """Yield every record between the beginning and the end found at the start, in order within a partition.

    With `since_ms` those before the first of that Kafka time are passed over, by the broker's index of times. Records
    written meanwhile are left out, so that reading a busy topic ends. `starts` are offsets to begin at, by partition,
    in place of the beginning. `progress` gets the records read so far.
    """
    ends = end_offsets(broker, topic)
    with _consuming(broker, topic) as (consumer, partitions):
        consumer.seek_to_beginning(*partitions)
        if since_ms is not None:
            _seek_to_time(consumer, partitions, since_ms, ends)
        for partition, offset in (starts or {}).items():
            consumer.seek(TopicPartition(topic, partition), offset)
        open_partitions = {tp for tp in partitions if consumer.position(tp) < ends[tp.partition]}
        num_read = 0
        while open_partitions:
            for tp, batch in consumer.poll(timeout_ms=200, max_records=5000).items():
                for record in batch:
                    if record.offset < ends[tp.partition]:
                        num_read += 1
                        yield record
            if progress:
                progress(num_read)
            # The position, not the last record: the last offsets may be markers that hold no record.
            open_partitions = {tp for tp in open_partitions if consumer.position(tp) < ends[tp.partition]}


def _seek_to_time(
    consumer: KafkaConsumer, partitions: list[TopicPartition], since_ms: int, ends: Mapping[int, int]
) -> None:
    for tp, found in consumer.offsets_for_times(dict.fromkeys(partitions, since_ms)).items():
        consumer.seek(tp, ends[tp.partition] if found is None else found.offset)


def _high_watermark(consumer: KafkaConsumer, tp: TopicPartition, listed: int) -> int:
    """Fetch at the listed end: the answer carries the high watermark, with or without records."""
    consumer.assign([tp])
    consumer.seek(tp, listed)
    for _ in range(3):
        consumer.poll(timeout_ms=2 * _FETCH_WAIT_MS, max_records=1)
        found = consumer.highwater(tp)
        if found is not None:
            return max(int(found), listed)
    return listed


class _Admin:
    """An admin client for one `with` block; a broker that is not there is BrokerUnavailable."""

    def __init__(self, broker: str) -> None:
        self._broker = broker

    def __enter__(self) -> KafkaAdminClient:
        self._client = connecting(self._broker, KafkaAdminClient, request_timeout_ms=15_000)
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()


def connecting(broker: str, client: Callable[..., Any], **configs: Any) -> Any:
    """Construct a kafka-python client; raises BrokerUnavailable when no broker answers within five seconds."""
    address = Broker.parse(broker)
    try:
        return client(
            bootstrap_servers=list(address.servers), bootstrap_timeout_ms=5_000, **address.security(), **configs
        )
    except (KafkaError, OSError) as away:
        # A client that is refused is only told that the connection has ended.
        refused = (
            "" if address.protocol == "PLAINTEXT" else ", or it refuses the login, its mechanism or the certificate"
        )
        raise BrokerUnavailable(
            f"no Kafka broker answers at {hosts(broker)} (INNERLOOP_BROKER){refused}: {away}"
        ) from None


def _partition_counts(admin: KafkaAdminClient, topics: Iterable[str]) -> dict[str, int]:
    found = {}
    for topic in admin.describe_topics(list(topics)):
        error = for_code(topic["error_code"])
        if topic["error_code"] == 0:
            found[topic["name"]] = len(topic["partitions"])
        elif error is not UnknownTopicOrPartitionError:
            raise error(topic["name"])
    return found


def _refuse_other_partitions(present: Mapping[str, int], partitions: int) -> None:
    for topic, count in present.items():
        if count != partitions:
            raise PartitionsDiffer(
                f"topic {topic} has {count} partitions, INNERLOOP_PARTITIONS says {partitions}: set it to {count} "
                f"(changing the number would move users to partitions that do not hold their state)"
            )


def _create(admin: KafkaAdminClient, topic: str, configs: Mapping[str, str], partitions: int) -> None:
    spec = {"num_partitions": partitions, "replication_factor": -1, "configs": dict(configs)}
    with contextlib.suppress(TopicAlreadyExistsError):
        admin.create_topics({topic: spec}, wait_for_metadata=True)


@contextlib.contextmanager
def _consuming(broker: str, topic: str) -> Iterator[tuple[KafkaConsumer, list[TopicPartition]]]:
    consumer = connecting(
        broker,
        KafkaConsumer,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=_FETCH_WAIT_MS,
        allow_auto_create_topics=False,
    )
    try:
        numbers = consumer.partitions_for_topic(topic)
        if not numbers:
            raise TopicMissing(f"topic {topic} does not exist on {hosts(broker)}: run `innerloop migrate`")
        partitions = [TopicPartition(topic, number) for number in sorted(numbers)]
        consumer.assign(partitions)
        yield consumer, partitions
    finally:
        consumer.close()
