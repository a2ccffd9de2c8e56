"""Topics on a real Apache Kafka: how they are made, and that feeding and measuring agree with it."""

import json
from pathlib import Path

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from pipeline import topics
from pipeline.feeding import feed
from pipeline.lines import open_source
from pipeline.produce import Pace, interaction_record
from pipeline.settings import Settings
from tests.brokers import ApacheKafka

pytestmark = pytest.mark.kafka


def test_items_are_compacted_and_erasures_never_expire(kafka: ApacheKafka) -> None:
    configs = topics.topic_configs(Settings.load())
    assert topics.ensure_topics(kafka.address, configs, 3) == ["interactions", "items", "erasures"]
    assert topics.ensure_topics(kafka.address, configs, 3) == []
    admin = KafkaAdminClient(bootstrap_servers=kafka.address)
    try:
        resources = [ConfigResource(ConfigResourceType.TOPIC, topic) for topic in configs]
        found = admin.describe_configs(resources, config_filter="all")["topic"]
    finally:
        admin.close()
    assert found["interactions"]["cleanup.policy"]["value"] == "delete"
    assert found["items"]["cleanup.policy"]["value"] == "compact"
    assert found["erasures"]["cleanup.policy"]["value"] == "delete"
    assert found["erasures"]["retention.ms"]["value"] == "-1"


def test_a_fed_file_arrives_once_and_whole(kafka: ApacheKafka, tmp_path: Path) -> None:
    topics.ensure_topics(kafka.address, {"interactions": {}}, 4)
    file = tmp_path / "events.jsonl"
    event = {"user_id": "u", "item_id": "i", "type": "click", "ts": 1_700_000_000_000}
    file.write_text("\n".join(json.dumps({**event, "user_id": f"u{n % 50}", "item_id": f"i{n}"}) for n in range(5000)))
    with open_source(str(file)) as source:
        fed = feed(kafka.address, "interactions", source, interaction_record, pace=Pace())
    assert (fed.sent, fed.complete) == (5000, True)
    assert sum(topics.end_offsets(kafka.address, "interactions").values()) == 5000
    records = list(topics.read_topic(kafka.address, "interactions"))
    assert len({record.value for record in records}) == len(records) == 5000
    assert all(record.timestamp > 1_700_000_000_000 for record in records)
