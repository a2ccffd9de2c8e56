"""What travels from the fetcher to the inner loop: records, in chunks of one partition, by the fetch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Place = tuple[str, int]  # topic, partition


class Record(Protocol):
    """What is read of a Kafka record; `timestamp` is Kafka's, in ms."""

    @property
    def topic(self) -> str:
        """Topic it lies in."""

    @property
    def partition(self) -> int:
        """Partition it lies in."""

    @property
    def offset(self) -> int:
        """Its place in the partition."""

    @property
    def timestamp(self) -> int:
        """Kafka's timestamp, epoch ms."""

    @property
    def key(self) -> bytes | None:
        """Key, if any."""

    @property
    def value(self) -> bytes | None:
        """Value; None is a tombstone."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one partition: every offset in [start, next_offset) that holds one.

    The offsets are those that were asked for and read up to: one without a record is a transaction marker or was
    compacted away. A chunk may hold no record at all.
    """

    topic: str
    partition: int
    start: int
    next_offset: int
    records: Sequence[Record]

    def since(self, offset: int) -> Chunk:
        """Its part from an offset in [start, next_offset) on."""
        if offset == self.start:
            return self
        records = [record for record in self.records if record.offset >= offset]
        return Chunk(self.topic, self.partition, offset, self.next_offset, records)


@dataclass(frozen=True, slots=True)
class Fetch:
    """What one fetch brought."""

    chunks: list[Chunk]

    @property
    def num_records(self) -> int:
        """Records in all chunks."""
        return count_records(self.chunks)


def count_records(chunks: Sequence[Chunk]) -> int:
    """Records in all of these chunks."""
    return sum(len(chunk.records) for chunk in chunks)


def cut(chunks: Sequence[Chunk], num_records: int) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks of the first `num_records` records, and those of the rest."""
    now, later = list[Chunk](), list[Chunk]()
    for chunk in chunks:
        room = max(0, num_records - count_records(now))
        if later or room == 0:
            later.append(chunk)
        elif len(chunk.records) <= room:
            now.append(chunk)
        else:
            place = chunk.records[room - 1].offset + 1
            now.append(Chunk(chunk.topic, chunk.partition, chunk.start, place, chunk.records[:room]))
            later.append(Chunk(chunk.topic, chunk.partition, place, chunk.next_offset, chunk.records[room:]))
    return now, later
