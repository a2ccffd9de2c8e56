"""Between the fetcher and the inner loop: fetched chunks wait here, so that batches grow when work takes longer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from pipeline.chunks import Chunk, Fetch


class Inbox:
    """A bounded queue of fetches; `take` gives all that wait, up to a number of records."""

    def __init__(self, *, max_records: int) -> None:
        self._max_records = max_records
        self._waiting: deque[Fetch] = deque()
        self._num_records = 0
        self._open = True
        self._changed = asyncio.Condition()

    async def put(self, fetch: Fetch) -> None:
        """Add a fetch, waiting while more than twice a batch is waiting: this is what holds the consumer back.

        A fetch that comes, or has been waiting to come, while the inbox is closed is dropped.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: not self._open or self._num_records < 2 * self._max_records)
            if not self._open:
                return
            self._waiting.append(fetch)
            self._num_records += fetch.num_records
            self._changed.notify_all()

    async def take(self, generation: Callable[[], int]) -> list[Chunk]:
        """Wait for chunks of the current generation; older ones are dropped, the seek brings their records again."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._waiting))
            chunks: list[Chunk] = []
            num_taken = 0
            while self._waiting and num_taken < self._max_records:
                fetch = self._waiting.popleft()
                self._num_records -= fetch.num_records
                if fetch.generation == generation():
                    chunks += fetch.chunks
                    num_taken += fetch.num_records
            self._changed.notify_all()
            return chunks

    async def close(self) -> None:
        """Drop everything that waits and whatever comes until `reopen`: the partitions are about to move.

        Dropping only what waits would let in a fetch from behind the gap that this leaves.
        """
        async with self._changed:
            self._open = False
            self._waiting.clear()
            self._num_records = 0
            self._changed.notify_all()

    async def reopen(self) -> None:
        """Take fetches again: the consumer has been sought to the positions."""
        async with self._changed:
            self._open = True
            self._changed.notify_all()
