"""MovieLens-100K as a stream through the worker's own code, one event after the other, without Kafka and Postgres.

`OfflineWorker` holds what a worker holds (users, item statistics, catalogue, ranker) and applies micro-batches with
`pipeline.adaptation`; nothing of the model or of the support sets is written again here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.encoder import resolve_encoder
from models.episodes import Interactions
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.ranker import Ranker, Step, TaskBatch
from pipeline.adaptation import Adaptation, Types
from pipeline.batching import micro_batch
from pipeline.catalogue import ListedItem, build_catalogue, listed_rows
from pipeline.datasets import MovieLens100K, Phase, load_ml100k
from pipeline.embeddings import cached_embeddings
from pipeline.outcome import Outcome
from pipeline.support import Segments, UserTable
from schemas.events import parse_interaction
from tests.factories import Record, chunk

Ints = NDArray[np.int64]
NEXT = 10


@dataclass(frozen=True)
class Stream:
    """One phase: the events before the cut, and those after it with the user's K and next ten items.

    Attributes:
        fit, events: row numbers of the data set, in stream order.
        num_events: [N] K of each event of the stream.
        next_items: [N, 10] this and the user's next nine items inside the phase, 0 where there are fewer.
        unseen: [N] whether the user has no event before the cut.
    """

    data: MovieLens100K
    fit: Ints
    events: Ints
    num_events: Ints
    next_items: Ints
    unseen: NDArray[np.bool_]


def load_stream(home: Path, phase: Phase) -> Stream:
    """Cut the data set as the published figures were cut."""
    data = load_ml100k(home)
    fit, events = data.rows("fit", phase), data.rows("stream", phase)
    later: dict[int, list[int]] = {}
    for row in events.tolist():
        later.setdefault(int(data.users[row]), []).append(int(data.items[row]))
    before = dict(zip(*np.unique(data.users[fit], return_counts=True), strict=True))
    so_far: dict[int, int] = {}
    num_events, next_items = np.zeros(len(events), np.int64), np.zeros((len(events), NEXT), np.int64)
    for place, row in enumerate(events.tolist()):
        user = int(data.users[row])
        passed = so_far.get(user, 0)
        following = later[user][passed : passed + NEXT]
        num_events[place], next_items[place, : len(following)] = before.get(user, 0) + passed, following
        so_far[user] = passed + 1
    return Stream(data, fit, events, num_events, next_items, np.isin(data.users[events], data.users[fit], invert=True))


def train(stream: Stream, home: Path, *, seed: int, encoder: str = "auto") -> MetaParameters:
    """Meta-train on the events before the cut."""
    data, rows = stream.data, stream.fit
    items = sorted({str(item) for item in data.items[rows]}, key=str.encode)
    row_of = {item_id: row for row, item_id in enumerate(items)}
    texts = {film.item_id: film.text for film in data.films}
    text_encoder = resolve_encoder(encoder)
    number: dict[int, int] = {}
    users = [number.setdefault(int(user), len(number)) for user in data.users[rows]]
    interactions = Interactions(
        torch.tensor(users),
        torch.tensor([row_of[str(item)] for item in data.items[rows]]),
        torch.from_numpy(data.seconds[rows] * 1000),
        torch.ones(len(rows)),
        len(items),
    )
    embeddings = cached_embeddings(text_encoder, [texts[item] for item in items], home / "cache")
    parameters, _ = meta_train(
        interactions, embeddings, item_ids=tuple(items), encoder=text_encoder.name, seed=seed, support_size=60
    )
    return parameters


class Recorder(Ranker):
    """A ranker that notes where the next ten items stood before each event: [·, 10] for adapted and for start."""

    targets: list[Ints]
    ranks: list[tuple[NDArray[np.float32], NDArray[np.float32]]]

    def step(
        self, tasks: TaskBatch, priors: torch.Tensor, targets: torch.Tensor, previous: torch.Tensor | None = None
    ) -> Step:
        """Predict, note, learn; no user may come twice in a call."""
        adapted, start = self.logits(tasks, priors)
        for row in range(int((targets >= 0).sum())):
            rows = self.targets.pop(0)
            self.ranks.append((mean_ranks(adapted[row].numpy(), rows), mean_ranks(start[row].numpy(), rows)))
        return super().step(tasks, priors, targets, previous)


def mean_ranks(scores: NDArray[np.float32], targets: Ints) -> NDArray[np.float32]:
    """1-based ranks of the target rows, ties sharing their mean; -1 for an absent target."""
    own = scores[np.maximum(targets, 0)][:, None]
    ranks = 1 + (scores[None] > own).sum(1) + ((scores[None] == own).sum(1) - 1) / 2
    return np.where(targets >= 0, ranks, -1).astype(np.float32)


class OfflineWorker:
    """The worker's memory and arithmetic over one partition."""

    def __init__(self, stream: Stream, parameters: MetaParameters, home: Path, *, encoder: str = "auto") -> None:
        films = stream.data.films
        items = [ListedItem(film.item_id, number, film.text, True, True) for number, film in enumerate(films, 1)]
        texts = [item.text for item in listed_rows(items)]
        embeddings = cached_embeddings(resolve_encoder(encoder), texts, home / "cache")
        self.stream = stream
        self.catalogue = build_catalogue(1, items, embeddings, parameters)
        self.ranker = Recorder(parameters, self.catalogue.tables)
        self.ranker.targets, self.ranker.ranks = [], []
        self.table = UserTable(1000, support_size=60, state_size=0, id_horizon=1000, seen_horizon=2000)
        self.adaptation = Adaptation(self.table, Types.of({}), top_n=50)
        self.adaptation.activate(1, self.ranker, self.catalogue)
        self.adaptation.statistics[0] = self.adaptation.initial_statistics(0)

    def remember_fitted_users(self) -> None:
        """Give users of the stream the support sets that they had before the cut; their adapters are empty."""
        data = self.stream.data
        streamed = set(data.users[self.stream.events].tolist())
        for row in self.stream.fit.tolist():
            if int(data.users[row]) in streamed:
                slot = self._slot(str(data.users[row]))
                number = np.array([self.catalogue.number_of[str(data.items[row])]])
                self.table.append_positive(slot, number, np.array([6]))
                self.table.append_seen(slot, number, Segments())

    def apply(self, places: Sequence[int]) -> Outcome:
        """Apply these events of the stream (consecutive; offset = place in the stream) as one micro-batch."""
        rows = self.stream.events[places]
        events = self.stream.data.events(rows)
        records = [
            Record("interactions", 0, place, event["ts"], event["user_id"].encode(), json.dumps(event).encode())
            for place, event in zip(places, events, strict=True)
        ]
        batch = micro_batch([chunk(records)], {0: places[0]}, parse_interaction)
        for event in batch.events:
            self._slot(event.user_id)
        self.ranker.targets += [self._rows(self.stream.next_items[place]) for place in places]
        return self.adaptation.apply(batch)

    def listed(self, outcome: Outcome, k: int) -> dict[str, list[str]]:
        """The k best item ids of each user touched."""
        ids = {number: item_id for item_id, number in self.catalogue.number_of.items()}
        users = self.table.user_ids(outcome.slots)
        return {
            user: [ids[number] for number in row[:k].tolist()]
            for user, row in zip(users, outcome.lists.item_nos, strict=True)
        }

    def _slot(self, user_id: str) -> Ints:
        return self.table.admit([user_id], [0]) if self.table.missing([user_id]) else self.table.slots([user_id])

    def _rows(self, items: Ints) -> Ints:
        numbers = [self.catalogue.number_of[str(item)] if item else 0 for item in items.tolist()]
        return self.catalogue.row_of[numbers]


def runs_of_distinct_users(stream: Stream, *, longest: int = 64) -> Iterator[list[int]]:
    """Consecutive places of the stream in which no user comes twice: one round each, in order."""
    run: list[int] = []
    users: set[int] = set()
    for place, row in enumerate(stream.events.tolist()):
        user = int(stream.data.users[row])
        if user in users or len(run) == longest:
            yield run
            run, users = [], set()
        run.append(place)
        users.add(user)
    if run:
        yield run
