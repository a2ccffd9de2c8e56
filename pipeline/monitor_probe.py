"""The probe's wiring: the topic and the live version go into `models.refit`."""

from __future__ import annotations

import torch

from models.encoder import resolve_encoder
from models.episodes import Interactions
from models.refit import refit_gain
from pipeline import registry, training_data
from pipeline.artefacts import Artefacts
from pipeline.embeddings import cached_embeddings
from pipeline.meta_training import weight_of_types
from pipeline.settings import Settings
from pipeline.training_data import Columns, NothingToLearn
from schemas.database import connect_engine
from schemas.mapping import load_mapping

LEAST = 2  # positives of a window: one half to fit, one to judge


def gain_of_refit(settings: Settings, window_ms: tuple[int, int]) -> float:
    """Nats per label that a refit on the topic's positives since a Kafka time would save.

    `window_ms`: from when on, and how long that is; no more than a few times of it is read before, for the users'
    histories, and nothing of what users did before they asked to be forgotten.
    Raises what reading the topic, the version or the texts raises, and NothingToLearn for a window without a positive.
    """
    torch.set_num_threads(settings.torch_threads)
    engine = connect_engine(settings.database("writer"))
    try:
        _, parameters = registry.load_live(engine, Artefacts(settings.artefacts_place()))
    finally:
        engine.dispose()
    columns, recent = _positives(settings, window_ms)
    texts = training_data.texts_of_topic(settings.broker_address(), settings.topic_items)
    encoder = resolve_encoder(settings.encoder, device="cpu")
    embeddings = torch.zeros(len(columns.item_ids), encoder.size)
    known = [row for row, item_id in enumerate(columns.item_ids) if item_id in texts]
    if known:
        found = cached_embeddings(encoder, [texts[columns.item_ids[row]] for row in known], settings.home / "cache")
        embeddings[torch.tensor(known)] = found
    interactions = Interactions(
        torch.from_numpy(columns.users),
        torch.from_numpy(columns.items),
        torch.from_numpy(columns.times),
        torch.from_numpy(columns.weights),
        len(columns.item_ids),
    )
    return refit_gain(parameters, interactions, embeddings, columns.item_ids, recent=recent)


def _positives(settings: Settings, window_ms: tuple[int, int]) -> tuple[Columns, int]:
    """The window's positives with those before, and how many of them are the window's."""
    broker = settings.broker_address()
    found = training_data.window_and_history(
        broker,
        settings.topic_interactions,
        load_mapping(settings.mapping) if settings.mapping else None,
        window_ms=window_ms,
        erased=training_data.erasures_of_topic(broker, settings.topic_erasures),
        progress=_ignored,
    )
    weights = weight_of_types(settings)
    whole = training_data.collect((one.event for one in found), weights, _ignored)
    before = (one.event for one in found if one.timestamp_ms < window_ms[0])
    recent = len(whole.users) - len(training_data.collect(before, weights, _ignored).users)
    if recent < LEAST:
        raise NothingToLearn(f"{recent} positives since the alarm are left in the topic: too few to judge a refit on")
    return training_data.numbered(whole), recent


def _ignored(_done: int) -> None:
    """Nobody watches a probe."""
