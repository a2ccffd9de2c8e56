"""innerloop itself in a backtest: meta-trained on the fit part, streamed through the worker's own code."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import later_horizon
from models.encoder import TextEncoder
from models.episodes import Interactions
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.recipe import DEFAULT, Recipe
from models.table_fitting import Window
from pipeline.adaptation import Types
from pipeline.backtest_figures import Floats, Judged
from pipeline.catalogue import ListedItem
from pipeline.embeddings import cached_embeddings
from pipeline.interaction_log import InteractionLog
from pipeline.offline_worker import MakeRanker, Noted, OfflineWorker, Recorder
from pipeline.outcome import Outcome
from pipeline.protocols import StreamCut
from pipeline.support import Ints

BATCH_EVENTS = 1024
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Model:
    """Parameters from the fit part, with the report of their training and the texts of all items [N, T]."""

    parameters: MetaParameters
    report: dict[str, Any]
    embeddings: Tensor
    seconds: float
    recipe: Recipe

    def worker(
        self, log: InteractionLog, types: Types, make_ranker: MakeRanker, *, num_partitions: int = 1
    ) -> OfflineWorker:
        """A worker with all items of the log as its catalogue."""
        return OfflineWorker(
            self.parameters,
            [
                ListedItem(item_id, row + 1, log.texts[row] or "", True, True)
                for row, item_id in enumerate(log.item_ids)
            ],
            self.embeddings,
            capacity=len(log.user_ids) + 1,
            types=types,
            num_partitions=num_partitions,
            make_ranker=make_ranker,
        )


@dataclass(frozen=True)
class Streamed:
    """What the worker said before each judged event, in their order, and what it cost.

    Attributes:
        losses: [E, 2] prequential loss adapted, start.
        scores: [E, k] with which the adapted lists would have been served.
        event_seconds: CPU time per event.
        user_bytes: memory per user.

    """

    adapted: Judged
    start: Judged
    losses: Floats
    scores: Floats
    event_seconds: float
    user_bytes: int


def embed(log: InteractionLog, encoder: TextEncoder, home: Path, tell: Tell) -> Tensor:
    """Text embeddings of all items [N, T]; zeros where there is no text."""
    rows = [row for row, text in enumerate(log.texts) if text]
    embeddings = torch.zeros(len(log.item_ids), encoder.size)
    if rows:
        texts = [log.texts[row] or "" for row in rows]
        found = cached_embeddings(encoder, texts, home / "cache", lambda n, of: tell("encode texts", n, of))
        embeddings[torch.tensor(rows)] = found
    return embeddings


def interactions_of(log: InteractionLog, events: Ints) -> Interactions:
    """Positive events of these numbers, over all items of the log."""
    chosen = events[log.positive[events]]
    return Interactions(
        torch.from_numpy(log.users[chosen]),
        torch.from_numpy(log.items[chosen]),
        torch.from_numpy(log.times[chosen]),
        torch.from_numpy(log.weights[chosen]),
        len(log.item_ids),
    )


def train(
    log: InteractionLog, fit: Ints, embeddings: Tensor, *, encoder: str, seed: int, tell: Tell, recipe: Recipe = DEFAULT
) -> Model:
    """Meta-train on the fit part's positives and the items that occur in it."""
    started = time.process_time()
    interactions = interactions_of(log, fit)
    rows, items = torch.unique(interactions.items, return_inverse=True)  # ascending, so in the bytes order of the ids
    parameters, report = meta_train(
        Window(
            Interactions(interactions.users, items, interactions.times, interactions.weights, len(rows)),
            embeddings[rows],
            item_ids=tuple(log.item_ids[row] for row in rows.tolist()),
            encoder=encoder,
            seed=seed,
            recipe=recipe,
        ),
        progress=tell,
    )
    return Model(parameters, report, embeddings, time.process_time() - started, recipe)


def for_later_events(model: Model, log: InteractionLog, fit: Ints, *, seed: int, tell: Tell) -> Model:
    """The same model for a user's events 21 to 40, fitted and chosen on the fit part's users."""
    started = time.process_time()
    interactions, row_of = interactions_of(log, fit), np.full(len(log.item_ids), -1)
    place = {item_id: row for row, item_id in enumerate(log.item_ids)}
    ids = model.parameters.item_ids
    known = [place[item_id] for item_id in ids]
    row_of[known] = np.arange(len(ids))
    rows = torch.from_numpy(row_of)[interactions.items]
    trained = replace(interactions, items=rows, num_items=len(ids)).select(rows >= 0)
    parameters = later_horizon.for_later_events(
        model.parameters,
        trained,
        model.embeddings[known],
        recipe=model.recipe,
        seed=seed,
        progress=lambda n, of: tell("parts and weights for later events", n, of),
    )
    return replace(model, parameters=parameters, seconds=model.seconds + time.process_time() - started)


def stream(
    model: Model, log: InteractionLog, cut: StreamCut, queries: Ints, types: Types, *, num_partitions: int, tell: Tell
) -> Streamed:
    """Remember the fit part's users, then predict and learn the stream event by event.

    `queries` [S, 10] as `cut.next_items`, -1 throughout for events that are not to be judged.
    """
    worker = model.worker(log, types, Recorder, num_partitions=num_partitions)
    worker.remember(log.events(cut.fit[np.isin(log.users[cut.fit], log.users[cut.stream])]))
    started = time.process_time()
    place_of = np.full(len(log), -1)
    place_of[cut.judged] = np.arange(len(cut.judged))
    noted, places, losses = [], [], np.zeros((len(cut.judged), 2))
    for begin in range(0, len(cut.stream), BATCH_EVENTS):
        numbers = cut.stream[begin : begin + BATCH_EVENTS]
        found, outcome = _apply(worker, log, numbers, queries, place_of)
        where = _places(outcome, place_of)
        places.append(where[(queries[where] >= 0).any(1)])
        noted.append(found)
        losses[where] = np.stack([outcome.prequential.loss_adapted, outcome.prequential.loss_start], 1)
        tell("stream", min(begin + BATCH_EVENTS, len(cut.stream)), len(cut.stream))
    order = np.argsort(np.concatenate(places), kind="stable")
    columns = [torch.cat(column).numpy()[order] for column in zip(*noted, strict=True)]
    asked = (queries >= 0).any(1)
    return Streamed(
        Judged(columns[0].astype(np.float32), columns[2]),
        Judged(columns[1].astype(np.float32), columns[3]),
        losses[asked],
        columns[4].astype(np.float64),
        (time.process_time() - started) / max(len(cut.stream), 1),
        worker.table.bytes_per_user,
    )


def _apply(
    worker: OfflineWorker, log: InteractionLog, numbers: Ints, queries: Ints, place_of: Ints
) -> tuple[Noted, Outcome]:
    assert isinstance(worker.ranker, Recorder)  # noqa: S101 - for the type checker
    batch = worker.micro_batch(list(log.events(numbers)))
    places = place_of[[event.id_hash for event in batch.events]]
    worker.ranker.expect(queries[places[places >= 0]])
    outcome = worker.apply(batch)
    return worker.ranker.take_noted(), outcome


def _places(outcome: Outcome, place_of: Ints) -> Ints:
    """Place in the judged stream of each row of the prequential record."""
    places = place_of[[event.id_hash for event in outcome.batch.events]]
    return places[places >= 0]
