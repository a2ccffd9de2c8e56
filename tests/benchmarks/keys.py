"""What feeder and consumers agree on; light, because the feeder should start at once."""

from __future__ import annotations

from kafka.partitioner.default import murmur2

NUM_PARTITIONS, TOPIC = 4, "interactions"


def item_ids(num_items: int) -> list[str]:
    """In bytes order."""
    return [f"item-{number:05d}" for number in range(num_items)]


def partition_of(key: bytes) -> int:
    """Kafka's default partitioner."""
    return int((murmur2(key) & 0x7FFFFFFF) % NUM_PARTITIONS)
