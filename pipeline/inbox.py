"""Between the fetcher and the inner loop: fetched chunks wait here, so that batches grow when work takes longer.

A chunk may be read before a seek, during it, or by a partition's former owner, and one may get lost on the way: Faust
drops messages whenever partitions move. Offsets decide, not times: of every partition, each chunk taken begins exactly
where the one before it ended, the first where the consumer was sought to.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

import structlog

from pipeline.chunks import Chunk, Fetch, Place

log = structlog.get_logger()


class Inbox:
    """A bounded queue of fetches; `take` gives all that wait and follow on, up to a number of records."""

    def __init__(self, *, max_records: int) -> None:
        self.has_gap = False
        self._max_records = max_records
        self._waiting: deque[Fetch] = deque()
        self._num_records = 0
        self._next: dict[Place, int] | None = None  # the offsets at which the partitions go on; None while closed
        self._changed = asyncio.Condition()

    async def put(self, fetch: Fetch) -> None:
        """Add a fetch, waiting while more than twice a batch is waiting: this is what holds the consumer back.

        A fetch that comes, or has been waiting to come, while the inbox is closed is dropped.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._next is None or self._num_records < 2 * self._max_records)
            if self._next is None:
                return
            self._waiting.append(fetch)
            self._num_records += fetch.num_records
            self._changed.notify_all()

    async def take(self, *, wait: bool = True) -> list[Chunk]:
        """Chunks that are there or, with `wait`, will come; what was taken before is left out.

        A chunk that begins behind a gap sets `has_gap` and closes the inbox: the consumer is to be sought again.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._waiting) or not wait)
            chunks: list[Chunk] = []
            num_taken = 0
            while self._waiting and num_taken < self._max_records:
                fetch = self._waiting.popleft()
                self._num_records -= fetch.num_records
                num_taken += fetch.num_records
                chunks += [after for chunk in fetch.chunks if (after := self._following(chunk))]
            if self.has_gap:
                self._drop()
            self._changed.notify_all()
            return chunks

    async def close(self) -> None:
        """Drop everything that waits and whatever comes until `reopen`: the partitions are about to move."""
        async with self._changed:
            self._drop()
            self.has_gap = False
            self._changed.notify_all()

    async def reopen(self, positions: Mapping[Place, int]) -> None:
        """Take fetches of these partitions again, each from its offset on."""
        async with self._changed:
            self._drop()
            self.has_gap = False
            self._next = dict(positions)
            self._changed.notify_all()

    def _following(self, chunk: Chunk) -> Chunk | None:
        """The part of a chunk that follows what was taken of its partition, if any."""
        place = (chunk.topic, chunk.partition)
        if self._next is None or place not in self._next or chunk.next_offset <= self._next[place]:
            return None  # not ours, or taken before
        expected = self._next[place]
        if chunk.start > expected:
            log.info("a fetch does not follow on", topic=place[0], partition=place[1], at=expected, fetched=chunk.start)
            self.has_gap = True
            return None
        self._next[place] = chunk.next_offset
        return chunk.since(expected)

    def _drop(self) -> None:
        self._next = None
        self._waiting.clear()
        self._num_records = 0
