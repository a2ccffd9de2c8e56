"""What a worker, or who explains what one wrote, begins with: empty memory, and where versions are found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from models.encoder import resolve_encoder
from models.meta_parameters import MetaParameters
from pipeline import registry
from pipeline.adaptation import Adaptation, Types
from pipeline.artefacts import Artefacts
from pipeline.embeddings import cached_embeddings
from pipeline.loop_versions import Sources
from pipeline.rate_limit import RateLimit
from pipeline.settings import Settings
from pipeline.support import UserTable

if TYPE_CHECKING:
    from sqlalchemy import Engine


def empty_adaptation(settings: Settings, capacity: int) -> Adaptation:
    """Memory for so many users, as the settings say, under no version yet."""
    table = UserTable(
        capacity,
        support_size=settings.support_size,
        state_size=0,
        id_horizon=settings.dedup_events,
        seen_horizon=settings.seen_items,
        rate_limit=RateLimit(settings.user_events_per_minute) if settings.user_events_per_minute else None,
    )
    types = Types.of(settings.event_types)
    return Adaptation(table, types, top_n=settings.top_n, recommend_seen=settings.recommend_seen)


def version_sources(settings: Settings, engine: Engine) -> Sources:
    """Parameters, text embeddings and state maps of registered versions, as the settings say where to find them."""
    artefacts = Artefacts(settings.artefacts_place())
    return Sources(
        partial(registry.load, engine, artefacts), _embeddings(settings), partial(registry.load_state_maps, engine)
    )


def _embeddings(settings: Settings) -> Callable[[Any, MetaParameters], torch.Tensor]:
    encoders: list[Any] = []

    def embed(texts: Any, parameters: MetaParameters) -> torch.Tensor:
        if not encoders:
            encoders.append(resolve_encoder(settings.encoder, device=settings.device))
        encoder = encoders[0]
        registry.require_encoder(parameters, encoder.name)
        return cached_embeddings(encoder, texts, settings.home / "cache").to(settings.device)

    return embed
