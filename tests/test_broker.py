"""Brokers by address: plain ones, and those that want TLS and a login."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from faust.types import TP

from pipeline.broker import MECHANISMS, Broker, hosts
from pipeline.chunks import Fetch
from pipeline.outbox import Outbox
from pipeline.topics import BrokerUnavailable, ensure_topics, read_topic
from pipeline.transport import stream_app
from schemas.errors import ConfigurationError
from tests.brokers import SecuredKafka, why_no_kafka


def test_a_plain_address_is_a_list_of_hosts() -> None:
    assert Broker.parse("one:9092, two:9092") == Broker(("one:9092", "two:9092"))
    assert Broker.parse("plaintext://one:9092").security() == {"security_protocol": "PLAINTEXT"}


def test_a_login_is_read_from_the_url_and_kept_out_of_messages() -> None:
    address = "sasl_ssl://shop:p%40ss%2Fword@one:9093,two:9093?mechanism=SCRAM-SHA-512"
    broker = Broker.parse(address)
    assert (broker.servers, broker.protocol) == (("one:9093", "two:9093"), "SASL_SSL")
    assert (broker.username, broker.password, broker.mechanism) == ("shop", "p@ss/word", "SCRAM-SHA-512")
    assert broker.context is not None
    assert hosts(address) == "one:9093,two:9093"
    assert "p@ss" not in repr(broker)


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("", "no host"),
        ("kafka://one:9092", "not 'kafka'"),
        ("ssl://user:secret@one:9093", "has a login, ssl wants none"),
        ("sasl_ssl://one:9093", "has no login, sasl_ssl wants one"),
        ("sasl_plaintext://user:secret@one:9092?mechanism=GSSAPI", "not 'GSSAPI'"),
        ("sasl_plaintext://user:secret@one:9092?ca=/x", "option 'ca'; sasl_plaintext knows mechanism"),
        ("ssl://one:9093?ca=/nowhere.pem", "cannot be read"),
    ],
)
def test_an_address_that_cannot_be_meant_is_refused_without_its_password(address: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=r"INNERLOOP_BROKER") as refused:
        Broker.parse(address)
    assert named in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    if reason := why_no_kafka():
        pytest.skip(reason)
    kafka = SecuredKafka(pathlib.Path(tmp_path_factory.mktemp("secured")))
    kafka.start()
    yield kafka
    kafka.stop()


def address_of(secured: SecuredKafka, way: str) -> str:
    """The address of a door: by a mechanism's name with a login, else with a certificate."""
    if way in MECHANISMS:
        return secured.address_with_login(secured.PASSWORD, way)
    return secured.address_with_certificate()


@pytest.mark.kafka
@pytest.mark.parametrize("way", [*MECHANISMS, "certificate"])
def test_a_broker_behind_tls_and_a_login_is_fed_read_and_streamed(secured: SecuredKafka, way: str) -> None:
    address, topic = address_of(secured, way), f"interactions-{way}"
    assert ensure_topics(address, {topic: {}}, 1) == [topic]
    with Outbox(address, topic) as outbox:
        outbox.send(1, b"u1", b"click")
    assert [record.value for record in read_topic(address, topic)] == [b"click"]
    assert asyncio.run(first_fetch(address, topic)) == [b"click"]


@pytest.mark.kafka
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_wrong_password_is_said_to_be_possible_and_not_repeated(secured: SecuredKafka, mechanism: str) -> None:
    with pytest.raises(BrokerUnavailable) as refused:
        ensure_topics(secured.address_with_login("wrong-password", mechanism), {"t": {}}, 1)
    assert "refuses the login" in str(refused.value)
    assert "wrong-password" not in str(refused.value)


@pytest.mark.kafka
def test_who_shows_no_certificate_where_one_is_wanted_is_refused(secured: SecuredKafka) -> None:
    with pytest.raises(BrokerUnavailable, match=r"the certificate"):
        ensure_topics(secured.address_without_certificate(), {"t": {}}, 1)


async def first_fetch(address: str, topic_name: str) -> list[bytes | None]:
    """Values of what a worker's Faust app reads first."""
    fetches = asyncio.Queue[Fetch]()

    async def positions(assigned: set[TP]) -> Mapping[TP, int]:
        return dict.fromkeys(assigned, 0)

    async def deliver(stream: Any) -> None:
        async for fetch in stream.noack():
            await fetches.put(fetch)

    app = stream_app(
        broker=address, group=f"g-{topic_name}", session_timeout_seconds=6, max_records=10, positions=positions
    )
    topic = app.topic(topic_name, value_serializer="raw", key_serializer="raw", acks=False)
    app.agent(topic, name="deliver", concurrency=1)(deliver)
    app.finalize()
    await app.start()
    fetch = await asyncio.wait_for(fetches.get(), 60)
    await app.stop()
    return [record.value for chunk in fetch.chunks for record in chunk.records]
