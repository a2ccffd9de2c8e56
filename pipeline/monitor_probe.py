"""The probe's wiring: the topic and the live version go into `models.refit`."""

from __future__ import annotations

import torch

from models.encoder import resolve_encoder
from models.episodes import Interactions
from models.refit import refit_gain
from pipeline import registry, training_data
from pipeline.adaptation import Types
from pipeline.artefacts import Artefacts
from pipeline.embeddings import cached_embeddings
from pipeline.settings import Settings
from schemas.database import connect_engine
from schemas.mapping import load_mapping


def gain_of_refit(settings: Settings, recent: int) -> float:
    """Nats per label that a refit on the topic's `recent` newest positives would save.

    Raises what reading the topic, the version or the texts raises.
    """
    torch.set_num_threads(settings.torch_threads)
    engine = connect_engine(settings.database("writer"))
    try:
        _, parameters = registry.load_live(engine, Artefacts(settings.artefacts_place()))
    finally:
        engine.dispose()
    types = Types.of({name: (kind.label, kind.weight) for name, kind in settings.event_types.items()})
    mapping = load_mapping(settings.mapping) if settings.mapping else None
    events = training_data.events_of_topic(settings.broker_address(), settings.topic_interactions, mapping)
    columns = training_data.numbered(training_data.collect(events, types.weight * types.positive, lambda _done: None))
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
    window = min(recent, len(interactions))
    return refit_gain(parameters, interactions, embeddings, columns.item_ids, recent=window)
