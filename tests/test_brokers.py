import contextlib
import itertools
import socket

import pytest
from kafka import KafkaConsumer, KafkaProducer
from kafka.admin import KafkaAdminClient, NewTopic

from tests.brokers import ApacheKafka, Tansu


def produce_five(address: str) -> None:
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=address)) as admin:
        admin.create_topics([NewTopic("numbers", 1, 1)])
    with contextlib.closing(KafkaProducer(bootstrap_servers=address, acks="all")) as producer:
        for number in range(5):
            producer.send("numbers", str(number).encode())
        producer.flush()


def read(address: str, count: int) -> list[bytes]:
    with contextlib.closing(
        KafkaConsumer("numbers", bootstrap_servers=address, auto_offset_reset="earliest", consumer_timeout_ms=20_000)
    ) as consumer:
        return [record.value for record in itertools.islice(consumer, count)]


def test_tansu_gives_back_what_was_sent(broker: Tansu) -> None:
    produce_five(broker.address)
    assert read(broker.address, 5) == [b"0", b"1", b"2", b"3", b"4"]


def test_tansu_killed_no_longer_answers_and_stops_twice(broker: Tansu) -> None:
    broker.kill()
    broker.stop()
    host, port = broker.address.split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


@pytest.mark.kafka
def test_apache_kafka_killed_and_restarted_has_lost_nothing(kafka: ApacheKafka) -> None:
    produce_five(kafka.address)
    kafka.restart()
    assert read(kafka.address, 5) == [b"0", b"1", b"2", b"3", b"4"]
