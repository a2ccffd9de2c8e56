"""The worker's memory and arithmetic without Kafka and Postgres: decode → support → score → learn, over any events.

`OfflineWorker` holds what a worker holds (users, item statistics, catalogue, ranker) and applies micro-batches with
`pipeline.adaptation`, so that what is measured offline is what will be served. Pure: events in, outcomes out.

Letters: E events, Q query slots, N catalogue items, k list slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import popularity
from models.candidates import Candidates
from models.figures import query_ranks
from models.item_tables import ItemTables
from models.meta_parameters import MetaParameters
from models.ranker import Ranker, Step, TaskBatch
from models.top_items import best_rows
from pipeline.adaptation import Adaptation, Types
from pipeline.batching import MicroBatch, micro_batch
from pipeline.catalogue import Catalogue, ListedItem, build_catalogue
from pipeline.chunks import Chunk
from pipeline.outcome import Outcome
from pipeline.support import Ints, Segments, UserTable
from schemas.event_types import CODES
from schemas.events import Interaction, Rejected

TOPIC = "interactions"
LISTED = 10  # items of a list that are noted by a Recorder
MakeRanker = Callable[[MetaParameters, ItemTables], Ranker]


class TooManyUsers(ValueError):
    """More users than the table has slots; no database would bring the forgotten ones back. Give a larger capacity."""


@dataclass(frozen=True, slots=True)
class OfflineRecord:
    """What a worker reads of a Kafka record."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class OfflineWorker:
    """One worker over all partitions, under one meta version and one catalogue snapshot."""

    def __init__(
        self,
        parameters: MetaParameters,
        items: Sequence[ListedItem],
        embeddings: Tensor,
        *,
        capacity: int,
        types: Types | None = None,
        top_n: int = 50,
        num_partitions: int = 1,
        horizons: tuple[int, int] = (1000, 2000),
        recommend_seen: bool | None = None,
        make_ranker: MakeRanker = Ranker,
    ) -> None:
        """Take parameters and catalogue into use.

        Args:
            parameters: one meta version.
            items: the catalogue; item numbers from 1 on.
            embeddings: [N, T] of the known items, in the order of `listed_rows(items)`.
            capacity: most users there may be.
            types: labels and weights of the event types; by default those of the contract.
            top_n: length of the lists.
            num_partitions: users are spread over so many, each with its own item statistics.
            horizons: event ids and seen items remembered per user.
            recommend_seen: as the setting of this name; None leaves it to the parameters.
            make_ranker: the class of the ranker, `Recorder` to note ranks and lists.

        """
        self.types = types or Types.of({})
        self.catalogue: Catalogue = build_catalogue(1, items, embeddings, parameters)
        self.ranker = make_ranker(parameters, self.catalogue.tables)
        size, (ids, seen) = parameters.support_size, horizons
        self.table = UserTable(capacity, support_size=size, state_size=0, id_horizon=ids, seen_horizon=seen)
        self.adaptation = Adaptation(self.table, self.types, top_n=top_n, recommend_seen=recommend_seen)
        self.adaptation.activate(1, self.ranker, self.catalogue)
        self.positions = dict.fromkeys(range(num_partitions), 0)
        for partition in self.positions:
            self.adaptation.begin(partition, 0)

    def remember(self, events: Iterable[Interaction | Rejected]) -> None:
        """Give users the support sets and seen items of earlier events; their adapters stay empty, counts stay."""
        known = [event for event in events if isinstance(event, Interaction)]
        self._admit([(event, self.partition_of(event.user_id)) for event in known])
        slots = self.table.slots([event.user_id for event in known])
        items = np.fromiter((self.catalogue.number_of[event.item_id] for event in known), np.int64, len(known))
        types = np.fromiter((CODES[event.type] for event in known), np.int64, len(known))
        positive, dismissal = self.types.positive[types], self.types.dismissal[types]
        self.table.append_positive(slots[positive], items[positive], types[positive])
        marks = np.where(positive, items, np.where(dismissal, -items, 0))
        self.table.append_seen(slots[marks != 0], marks[marks != 0], Segments())

    def replay(self, events: Iterable[Interaction | Rejected], *, batch_events: int = 2048) -> Iterator[Outcome]:
        """Apply decoded events in their order, in micro-batches; cutting changes no figure, large ones are faster."""
        rest = iter(events)
        while now := list(islice(rest, batch_events)):
            yield self.apply(self.micro_batch(now))

    def micro_batch(self, events: Sequence[Interaction | Rejected]) -> MicroBatch:
        """Lay decoded events out as if they had just been read at the next offsets of their users' partitions."""
        placed: dict[int, list[Interaction | Rejected]] = {}
        for event in events:
            partition = self.partition_of(event.user_id) if isinstance(event, Interaction) else 0
            placed.setdefault(partition, []).append(event)
        chunks = [self._chunk(partition, rows) for partition, rows in placed.items()]
        decoded = (event for rows in placed.values() for event in rows)
        return micro_batch(chunks, self.positions, lambda *_: next(decoded))

    def apply(self, batch: MicroBatch) -> Outcome:
        """Score, then learn, one micro-batch."""
        for advance in batch.advances:
            self.positions[advance.partition] = advance.next_offset
        self._admit(list(zip(batch.events, batch.partition.tolist(), strict=True)))
        return self.adaptation.apply(batch)

    def forget_counts(self) -> None:
        """Put the item statistics back to the version's, at a fresh epoch: as if no other user had been here.

        What is then applied takes effect after POPULARITY_EPOCH offsets: shorter rounds never see each other's counts.
        """
        for partition, offset in self.positions.items():
            self.positions[partition] = offset + -offset % popularity.POPULARITY_EPOCH
            self.adaptation.begin(partition, self.positions[partition])

    def listed(self, outcome: Outcome, k: int) -> dict[str, list[str]]:
        """The k best item ids of each user whom the micro-batch touched, best first, as they stand after it."""
        ids = {number: item_id for item_id, number in self.catalogue.number_of.items()}
        rows, lengths = outcome.lists.item_nos[:, :k], outcome.lists.lengths
        users = self.table.user_ids(outcome.slots)
        return {
            user: [ids[number] for number in row[:length].tolist()]
            for user, row, length in zip(users, rows, lengths.tolist(), strict=True)
        }

    def successor(
        self,
        parameters: MetaParameters,
        items: Sequence[ListedItem],
        embeddings: Tensor,
        state_map: NDArray[np.float64] | None,
    ) -> OfflineWorker:
        """Another worker that goes on from here under another version, as one does after a swap.

        States are carried over by `state_map` [F, F of the other], or begin anew; this worker stays as it is.
        """
        other = copy(self)
        other.table, other.positions = deepcopy(self.table), dict(self.positions)
        other.catalogue = build_catalogue(self.catalogue.snapshot, items, embeddings, parameters)
        other.catalogue.number(self.catalogue.number_of)
        other.ranker = type(self.ranker)(parameters, other.catalogue.tables)
        other.adaptation = self.adaptation.beside()
        other.adaptation.table, other.adaptation.statistics = other.table, deepcopy(self.adaptation.statistics)
        version = self.adaptation.version
        maps = {} if state_map is None else {version: state_map}
        other.adaptation.activate(version + 1, other.ranker, other.catalogue, maps)
        for partition in other.positions:
            other.adaptation.take_up(partition)
        return other

    def partition_of(self, user_id: str) -> int:
        """Where a user lives: by a hash of the id, as Kafka's partitioners do (not the same one)."""
        return crc32(user_id.encode()) % len(self.positions)

    def _chunk(self, partition: int, events: Sequence[Interaction | Rejected]) -> Chunk:
        first = self.positions[partition]
        records = [_record(event, partition, first + place) for place, event in enumerate(events)]
        return Chunk(TOPIC, partition, first, first + len(records), records)

    def _admit(self, events: Sequence[tuple[Interaction, int]]) -> None:
        """Give every user a slot and every item a number."""
        partitions = {event.user_id: partition for event, partition in reversed(events)}
        missing = self.table.missing(partitions)
        if len(self.table) + len(missing) > self.table.capacity:
            raise TooManyUsers(f"more than capacity={self.table.capacity:,} users")
        if missing:
            self.table.admit(missing, [partitions[user_id] for user_id in missing])
        known = self.catalogue.number_of
        unknown = dict.fromkeys(event.item_id for event, _ in events if event.item_id not in known)
        self.catalogue.number({item_id: number for number, item_id in enumerate(unknown, len(self.catalogue.row_of))})


def _record(event: Interaction | Rejected, partition: int, offset: int) -> OfflineRecord:
    if isinstance(event, Rejected):
        return OfflineRecord(TOPIC, partition, offset, -1, None, None)
    return OfflineRecord(TOPIC, partition, offset, event.ts_ms, event.user_id.encode(), None)


class Noted(NamedTuple):
    """What stood before each of E events.

    Query ranks [E, Q] (0 = none), lists [E, k] of rows (-1 past the last), and the scores [E, k] that the adapted list
    would have been served with.
    """

    ranks_adapted: Tensor
    ranks_start: Tensor
    listed_adapted: Tensor
    listed_start: Tensor
    scores: Tensor


class Recorder(Ranker):
    """A ranker that also notes where query items stood, and what would have been listed, before each event.

    It knows nothing of how the ranker learns: what is carried from event to event is what `Step` and `TaskBatch`
    have in common.
    """

    def __init__(self, parameters: MetaParameters, items: ItemTables) -> None:
        """Expect nothing yet."""
        super().__init__(parameters, items)
        self._queries: list[Ints] = []
        self._noted: list[Noted] = []

    def expect(self, queries: Ints) -> None:
        """Give the catalogue rows [E, Q] to look for before each positive to come whose item has a row.

        -1 = none; an event whose whole query is absent is not noted.
        """
        self._queries.extend(queries)

    def take_noted(self) -> Noted:
        """Hand over what was noted since the last call, in the order of the events.

        Raises ValueError where expected events did not come: a duplicate is never scored.
        """
        if self._queries:
            raise ValueError(f"{len(self._queries)} expected events were not scored: leave duplicates out")
        noted, self._noted = self._noted, []
        if not noted:
            nothing, no_list = torch.zeros(0, 0), torch.zeros(0, LISTED, dtype=torch.int64)
            return Noted(nothing, nothing, no_list, no_list, torch.zeros(0, LISTED))
        return Noted(*(torch.cat(column) for column in zip(*noted, strict=True)))

    def step(
        self,
        tasks: TaskBatch,
        priors: Tensor,
        targets: Tensor,
        previous: Tensor | None = None,
        candidates: Candidates | None = None,
    ) -> Step:
        """Predict, learn, and note the logits as they stood before each event; padding is at the end."""
        step = super().step(tasks, priors, targets, previous, candidates)
        num = int((targets >= 0).sum())
        queries = np.stack(self._queries[:num])
        del self._queries[:num]
        wanted = torch.from_numpy(np.flatnonzero((queries >= 0).any(1))).to(targets.device)
        if len(wanted):
            query = torch.from_numpy(queries).to(targets.device)[wanted]
            self.note(_as_before(tasks, step, previous).taken(wanted), priors, query)
        return step

    def note(self, tasks: TaskBatch, priors: Tensor, query: Tensor) -> None:
        """Keep where query rows [n, Q] stand before n events, and what would be listed."""
        adapted, start = self.logits(tasks, priors)
        top = self.rank(tasks, priors, LISTED)
        ranks = query_ranks(adapted, query), query_ranks(start, query)
        self._noted.append(Noted(*ranks, top.items, best_rows(start, LISTED)[0], torch.sigmoid(top.logits)))


def _as_before(tasks: TaskBatch, step: Step, previous: Tensor | None) -> TaskBatch:
    """The tasks with what the user's event before in the same call has left behind."""
    if previous is None:
        return tasks
    follows = previous >= 0
    changed: dict[str, Any] = {}
    for name in {field.name for field in fields(TaskBatch)} & set(Step._fields):
        column = getattr(tasks, name).clone()
        column[follows] = getattr(step, name)[previous[follows]]
        changed[name] = column
    return replace(tasks, **changed)
