"""The work of a worker's thread: take partitions over, bring chunks into the database, follow versions and catalogue.

Everything here runs in one thread and may block. Passing database failures are waited out with the chunks in hand;
what is left are conditions that end the process, because a restart from the position mends them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import structlog

from pipeline.adaptation import Adaptation
from pipeline.batching import Parse, Walk, micro_batch, walk
from pipeline.bisection import by_halves
from pipeline.catalogue_store import read_items, write_items
from pipeline.chunks import Chunk, Place, count_records
from pipeline.flood_gate import FloodGate
from pipeline.forgotten import UserErased
from pipeline.loop_admission import admit, number
from pipeline.loop_measures import Measures
from pipeline.loop_patience import Patience
from pipeline.loop_progress import Progress
from pipeline.loop_take_over import resume
from pipeline.loop_versions import Sources, Versions
from pipeline.session import Fenced, RowRefused, StoreUnavailable
from pipeline.store import Store
from schemas.events import CatalogueItem, Interaction, Rejected, Withdrawal, parse_item

log = structlog.get_logger()

TAKE_OVER_ATTEMPTS = 5
WAITING_RECORDS = 100_000  # interactions held back at most while the catalogue is read
FOLLOW_SECONDS = 0.25  # how often versions and snapshots are looked for


class Loop:
    """State of the partitions that a worker holds, and the steps on it."""

    def __init__(
        self,
        store: Store,
        adaptation: Adaptation,
        sources: Sources,
        *,
        topics: tuple[str, str],
        parse: Parse[Interaction],
        dead_letter_limit: tuple[float, int],
        accept_data_gap: bool,
    ) -> None:
        self.store = store
        self.versions = Versions(adaptation, sources, self._refused)
        self.interactions, self.items = topics
        self.progress = Progress(store, lambda *found: self.measures.add(*found))
        self.measures = Measures()
        self._parse = parse
        self._flood_gate = FloodGate(*dead_letter_limit)
        self._accept_data_gap = accept_data_gap
        self._followed_at = 0.0
        self._catalogue_ends: dict[tuple[str, int], int] = {}
        self._open: list[Sequence[Chunk]] = []  # what would have to be done again, should it not become durable
        self.patiently = Patience()

    @property
    def adaptation(self) -> Adaptation:
        """That of the live version; its table and statistics are those of all."""
        return self.versions.live

    def wait_for_version(self) -> None:
        """Wait until a meta version is live, saying once what makes one."""
        said = False
        while not self.patiently.stopping:
            if self.patiently(self.store.heads).live is not None:
                return self.follow(force=True, wait=True)
            if not said:
                log.warning("no meta version is live: run `innerloop meta-train`; waiting, nothing is consumed")
                said = True
            self.patiently.alive()
            time.sleep(0.5)

    def take_over(self, bounds: Mapping[tuple[str, int], tuple[int, int]]) -> dict[tuple[str, int], int]:
        """Positions at which assigned partitions go on.

        Args:
            bounds: (beginning, end) offsets that the broker has, by (topic, partition).

        Raises:
            DataGap, TopicRecreated: the broker's log does not continue the position.

        """
        self._finish()
        for attempt in range(TAKE_OVER_ATTEMPTS):
            try:
                return self._take_over(bounds)
            except Fenced:  # the previous owner's last transaction came in between: its partitions are ours now
                if attempt == TAKE_OVER_ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _take_over(self, bounds: Mapping[tuple[str, int], tuple[int, int]]) -> dict[tuple[str, int], int]:
        for topic in (self.interactions, self.items):
            mine = {partition: bounds[topic, partition] for name, partition in bounds if name == topic}
            found = self.patiently(partial(self.store.positions, topic, mine))
            for partition in mine:
                place = (topic, partition)
                begin = partial(resume, self.store, place, found.get(partition), bounds[place])
                position = self.patiently(partial(begin, accept_gap=self._accept_data_gap))
                if self.progress.positions.get(place) != position:
                    self._forget(*place)
                self.progress.start(place, position)
        for key in self.progress.positions.keys() - bounds.keys():
            self._forget(*key)
            self.progress.drop(key)
        self._catalogue_ends = {key: end for key, (_, end) in bounds.items() if key[0] == self.items}
        self.follow(force=True, wait=True)  # nothing older than what the previous owner had in use
        self._activate()
        return dict(self.progress.positions)

    def ready(self, chunks: list[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
        """Chunks to advance by now, and those that wait: interactions, while the catalogue is behind what was assigned.

        A new deployment thus reads its catalogue before its first event; the wait ends at WAITING_RECORDS.
        """
        behind = any(self.progress.positions.get(key, end) < end for key, end in self._catalogue_ends.items())
        if not behind or count_records(chunks) > WAITING_RECORDS:
            return chunks, []
        return ([chunk for chunk in chunks if chunk.topic == self.items],
                [chunk for chunk in chunks if chunk.topic != self.items])  # fmt: skip

    def advance(self, chunks: Sequence[Chunk]) -> dict[Place, int]:
        """Bring chunks into the database; gives the positions that are durable now. Catalogue changes go first."""
        return self.begin(chunks) | self.settle()

    def begin(self, chunks: Sequence[Chunk]) -> dict[Place, int]:
        """Compute chunks and begin to commit them, once those begun before are durable; gives positions that are.

        Catalogue changes go first, and are durable when this returns.
        """
        changes = [chunk for chunk in chunks if chunk.topic == self.items]
        if changes:
            self._finish()
            self.patiently(partial(self._advance_items, changes), again=partial(self._reread, self.items))
        events = [chunk for chunk in chunks if chunk.topic == self.interactions]
        if events:
            self._open.append(events)
            self.patiently(self._begin_open, again=partial(self._reread, self.interactions))
            self._open = self._open[-1:]
        return self.progress.news()

    def settle(self) -> dict[Place, int]:
        """Wait until everything that was begun is durable; gives the positions that are since the last call."""
        self._finish()
        return self.progress.news()

    def _finish(self) -> None:
        """Nothing else may be read or written while a batch is on its way: it may have to be done again."""
        if self._open:
            self.patiently(self._finish_open, again=partial(self._reread, self.interactions))
            self._open = []

    def _finish_open(self) -> None:
        self._begin_open()  # what has been begun is past already, unless it failed
        try:
            self.progress.settle()
        except RowRefused:
            self._find_refused()

    def _begin_open(self) -> None:
        try:
            for chunks in self._open:
                self._begin(chunks, self._parse)
        except RowRefused:
            self._find_refused()

    def _find_refused(self) -> None:
        self._reread(self.interactions)
        for chunks in self._open:
            self._by_halves(self._begin_and_settle, chunks, self._parse)

    def _begin_and_settle(self, chunks: Sequence[Chunk], parse: Parse[Interaction]) -> None:
        self._begin(chunks, parse)
        self.progress.settle()

    def follow(self, *, force: bool = False, wait: bool = False) -> None:
        """Take new versions or a catalogue snapshot into use, at the positions where the partitions are now."""
        if not force and time.monotonic() - self._followed_at < FOLLOW_SECONDS:
            return
        self._followed_at = time.monotonic()
        self._finish()
        if self.patiently(lambda: self.store.forget_erased(self.adaptation.table)):
            for statistics in self.adaptation.statistics.values():
                statistics.leave_no_log()
        wanted = self.patiently(self.store.heads)
        if wanted.live is None:
            return
        if self.versions.follow(wanted, lambda: self.patiently(lambda: read_items(self.store)), wait=wait):
            self._activate()

    def _refused(self, version: int, reason: str) -> None:
        self.patiently(lambda: self.store.refused(version, reason))

    def _activate(self) -> None:
        """Record what is in use from the held positions on, and list popular items for users without events."""
        held = self.progress.held(self.interactions)
        if self.versions.heads.live is not None:
            for adaptation, partitions in self.versions.groups(held):
                self._activate_under(adaptation, {partition: held[partition] for partition in partitions})

    def _activate_under(self, adaptation: Adaptation, held: Mapping[int, int]) -> None:
        # What a version counted begins a partition's statistics also where the catalogue has not been read yet.
        self.patiently(lambda: number(self.store, adaptation, adaptation.ranker.parameters.item_ids))
        statistics = adaptation.statistics
        missing = [partition for partition in held if partition not in statistics]
        if missing:
            self.patiently(lambda: self._load_statistics(missing))
        for partition, offset in held.items():
            if partition not in statistics:
                adaptation.begin(partition, offset)
            adaptation.take_up(partition)
        popular = {partition: adaptation.popular(partition) for partition in held}
        mine = {partition: statistics[partition] for partition in held}
        version, snapshot = adaptation.version, self.versions.heads.snapshot
        self.patiently(
            lambda: self.store.activate(
                held, mine, popular, topic=self.interactions, version=version, snapshot=snapshot
            )
        )

    def _advance_items(self, chunks: Sequence[Chunk]) -> None:
        self._by_halves(self._advance_catalogue, chunks, _item_change)

    def _advance_catalogue(self, chunks: Sequence[Chunk], parse: Parse[CatalogueItem | Withdrawal]) -> None:
        found: Walk[CatalogueItem | Withdrawal] = walk(chunks, self.progress.held(self.items), parse)
        if not found.advances:
            return
        for move in found.advances:  # the last change of an item wins, the others are applied by it
            move.applied = move.next_offset - move.start - move.dead_lettered - move.skipped
        self.progress.intend(found.advances)
        write_items(self.store, found.events, found.advances, found.dead_letters)
        self.progress.moved(found.advances)
        self.follow(force=True)

    def _begin(self, chunks: Sequence[Chunk], parse: Parse[Interaction]) -> None:
        """One transaction per version in use: of a canary's partitions and of the others."""
        ahead = [chunk for chunk in chunks if chunk.next_offset > self.progress.positions[chunk.topic, chunk.partition]]
        for adaptation, partitions in self.versions.groups({chunk.partition for chunk in ahead}):
            self._begin_under(adaptation, [chunk for chunk in ahead if chunk.partition in partitions], parse)

    def _by_halves(
        self, step: Callable[[Sequence[Chunk], Parse[Any]], None], chunks: Sequence[Chunk], parse: Parse[Any]
    ) -> None:
        def refused(rejection: Rejected) -> None:
            log.error("the database refuses what comes of a record", reason=rejection.detail)
            if chunks[0].topic == self.interactions:
                self._flood_gate.give_up(rejection.reason)

        by_halves(step, chunks, parse, again=partial(self._reread, chunks[0].topic), refused=refused)

    def _begin_under(self, adaptation: Adaptation, chunks: Sequence[Chunk], parse: Parse[Interaction]) -> None:
        batch = micro_batch(chunks, self.progress.held(self.interactions), parse)
        if not batch.advances:
            return
        self._flood_gate.pass_on(batch)
        admit(self.store, batch, adaptation)
        outcome = adaptation.apply(batch)
        adapter_use = adaptation.table.adapter_use[outcome.slots]
        self.progress.begin(batch, adapter_use, self.store.rows(outcome, adaptation.table))

    def _forget(self, topic: str, partition: int) -> None:
        if topic == self.interactions:
            self.versions.forget(partition)

    def _reread(self, topic: str) -> None:
        """Read positions again and forget what was held: the answer to a COMMIT may have been lost.

        Raises:
            Fenced: another worker has moved a position meanwhile.

        """
        with suppress(StoreUnavailable, UserErased, RowRefused):  # which comes up again, if it has to be done again
            self.progress.settle()
        self.store.forget_erased(self.adaptation.table)
        held = list(self.progress.held(topic))
        for partition, position in self.store.positions(topic, held).items():
            self.progress.found((topic, partition), position)
            self._forget(topic, partition)
        if topic == self.interactions:
            self._load_statistics(held)

    def _load_statistics(self, partitions: Sequence[int]) -> None:
        for adaptation, mine in self.versions.groups(partitions):
            half_life = adaptation.ranker.parameters.half_life
            adaptation.statistics |= self.store.load_statistics(self.interactions, mine, half_life)
            for partition in set(mine) & adaptation.statistics.keys():
                adaptation.take_up(partition)


def _item_change(key: bytes | None, value: bytes | None, _: int) -> CatalogueItem | Withdrawal | Rejected:
    return parse_item(key, value)
