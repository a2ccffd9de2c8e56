"""MovieLens-100K as a stream through the worker's own code, one event after the other, without Kafka and Postgres.

The arithmetic is `pipeline.offline_worker`'s, which is the worker's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.encoder import resolve_encoder
from models.episodes import Interactions
from models.learner_tuning import Method
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.table_fitting import Window
from pipeline.batching import MicroBatch
from pipeline.catalogue import ListedItem, listed_rows
from pipeline.datasets import MovieLens100K, Phase, load_ml100k
from pipeline.embeddings import cached_embeddings
from pipeline.offline_worker import Noted, OfflineWorker, Recorder
from pipeline.outcome import Outcome
from schemas.events import Interaction, Rejected, parse_interaction

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


def train(
    stream: Stream,
    home: Path,
    *,
    seed: int,
    encoder: str = "auto",
    method: Method = Method(),  # noqa: B008
) -> MetaParameters:
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
        Window(interactions, embeddings, item_ids=tuple(items), encoder=text_encoder.name, seed=seed, support_size=60),
        method=method,
    )
    return parameters


class StreamWorker(OfflineWorker):
    """The worker over one phase, with the films as its catalogue; notes the ranks of the next ten items."""

    ranker: Recorder

    def __init__(
        self, stream: Stream, parameters: MetaParameters, home: Path, *, encoder: str = "auto", num_partitions: int = 1
    ) -> None:
        films = stream.data.films
        items = [ListedItem(film.item_id, number, film.text, True, True) for number, film in enumerate(films, 1)]
        texts = [item.text for item in listed_rows(items)]
        embeddings = cached_embeddings(resolve_encoder(encoder), texts, home / "cache")
        super().__init__(
            parameters, items, embeddings, capacity=1000, num_partitions=num_partitions, make_ranker=Recorder
        )
        self.stream = stream
        self._place_of = {f"ml-{row}": place for place, row in enumerate(stream.events.tolist())}

    def remember_fitted_users(self) -> None:
        """Give users of the stream the support sets that they had before the cut; their adapters are empty."""
        users = self.stream.data.users
        self.remember(self._events(self.stream.fit[np.isin(users[self.stream.fit], users[self.stream.events])]))

    def apply_places(self, places: Sequence[int]) -> Outcome:
        """Apply these events of the stream as one micro-batch."""
        batch = self.micro_batch(self._events(self.stream.events[places]))
        queries = self.stream.next_items[self._places(batch)]
        numbers = [[self.catalogue.number_of[str(item)] if item else 0 for item in row] for row in queries.tolist()]
        self.ranker.expect(self.catalogue.row_of[np.array(numbers)])
        return self.apply(batch)

    def ranks(self, places: Sequence[int]) -> tuple[Ints, Noted]:
        """Apply events, and give their places in the order in which they were noted, with what was noted."""
        outcome = self.apply_places(places)
        return self._places(outcome.batch), self.ranker.take_noted()

    def _places(self, batch: MicroBatch) -> Ints:
        return np.array([self._place_of[event.event_id] for event in batch.events])

    def _events(self, rows: Ints) -> list[Interaction | Rejected]:
        data = self.stream.data
        return [
            parse_interaction(str(event["user_id"]).encode(), json.dumps(event).encode(), event["ts"])
            for event in data.events(rows)
        ]
