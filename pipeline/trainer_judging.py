"""Judging a version against the live one: both go through the later events of the topic, by the worker's own code.

Up to the moment from which events count, one worker under the live version learns its users; there it is split in two,
one of them under the other version with states carried over, as a swap would do it. What is compared is what would
have been served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, func, select, text
from torch import Tensor

from models.encoder import resolve_encoder
from models.meta_parameters import MetaParameters
from models.state_map import state_map
from pipeline import judgement, promotion, registry
from pipeline.adaptation import Types
from pipeline.artefacts import Artefacts
from pipeline.catalogue import ListedItem, listed_rows
from pipeline.embeddings import cached_embeddings
from pipeline.judgement import Losses, Rules, Verdict
from pipeline.offline_worker import OfflineWorker
from pipeline.outcome import Prequential
from pipeline.settings import Settings
from pipeline.stages import Stages
from pipeline.training_data import Recorded
from schemas.event_types import NAMES
from schemas.events import Interaction, Rejected

JUDGING_LOCK = 0x696E_6E65_726C_6A75  # advisory, of the session: one trainer judges at a time
BATCH = 2048

_ITEMS = text("SELECT item_id, item_no, coalesce(text, ''), available, known FROM innerloop.items ORDER BY item_no")


@dataclass(frozen=True)
class Bench:
    """What versions are judged with: settings, database, artefacts, and how progress is shown."""

    settings: Settings
    engine: Engine
    artefacts: Artefacts
    progress: Stages

    def rules(self) -> Rules:
        """The thresholds, as the settings say."""
        return promotion.rules_of(self.settings)

    def catalogue(self) -> list[ListedItem]:
        """The items as they are now."""
        with self.engine.connect() as connection:
            return [ListedItem(*row) for row in connection.execute(_ITEMS)]


def judge(bench: Bench, version: int, events: Sequence[Recorded], *, since_ms: int) -> Verdict:
    """Judge a version against the live one on the events from a Kafka time on; those before teach both their users.

    Raises what `registry.load` raises.
    """
    _, live = registry.load_live(bench.engine, bench.artefacts)
    other = registry.load(bench.engine, bench.artefacts, version)
    before = [recorded.event for recorded in events if recorded.timestamp_ms < since_ms]
    later = [recorded.event for recorded in events if recorded.timestamp_ms >= since_ms]
    items = bench.catalogue()
    now = _worker(bench, live, items, events)
    _through(now, before, bench.progress, f"replay for version {version}")
    fitted = state_map(live, other)
    matrix = None if fitted is None else fitted.matrix.numpy()
    then = now.successor(other, items, _embeddings(bench, other, items), matrix)
    of_live = _through(now, later, bench.progress, "judge the live version")
    of_other = _through(then, later, bench.progress, f"judge version {version}")
    return _verdict(of_live, of_other, bench.rules())


@contextmanager
def alone(engine: Engine) -> Iterator[bool]:
    """Whether this trainer is the one that judges, for the block."""
    with engine.connect() as connection:
        mine = bool(connection.scalar(select(func.pg_try_advisory_lock(JUDGING_LOCK))))
        connection.commit()
        try:
            yield mine
        finally:
            if mine:
                connection.rollback()
                connection.execute(select(func.pg_advisory_unlock(JUDGING_LOCK)))
                connection.commit()


def _worker(
    bench: Bench, parameters: MetaParameters, items: Sequence[ListedItem], events: Sequence[Recorded]
) -> OfflineWorker:
    settings = bench.settings
    users = {recorded.event.user_id for recorded in events if isinstance(recorded.event, Interaction)}
    return OfflineWorker(
        parameters,
        items,
        _embeddings(bench, parameters, items),
        capacity=max(16, len(users)),
        types=Types.of(settings.event_types),
        top_n=1,  # lists are not looked at
        num_partitions=settings.partitions,
        horizons=(settings.dedup_events, settings.seen_items),
        recommend_seen=settings.recommend_seen,
    )


def _embeddings(bench: Bench, parameters: MetaParameters, items: Sequence[ListedItem]) -> Tensor:
    encoder = resolve_encoder(bench.settings.encoder, device=bench.settings.device)
    registry.require_encoder(parameters, encoder.name)
    return cached_embeddings(encoder, [item.text for item in listed_rows(items)], bench.settings.home / "cache")


def _through(
    worker: OfflineWorker, events: Sequence[Interaction | Rejected], progress: Stages, stage: str
) -> list[Prequential]:
    found = []
    for start in range(0, len(events), BATCH):
        outcome = worker.apply(worker.micro_batch(events[start : start + BATCH]))
        found.append(outcome.prequential)
        progress(stage, min(start + BATCH, len(events)), len(events))
    return found


def _verdict(live: Sequence[Prequential], other: Sequence[Prequential], rules: Rules) -> Verdict:
    """Events without a vector under either version teach nothing about the two."""
    ranked = (_column(live, "rank_adapted") > 0) | (_column(other, "rank_adapted") > 0)
    users = [user for part in live for user in part.user_ids]
    _, numbers = np.unique(np.array(users, dtype=str), return_inverse=True)
    types = _column(live, "types").astype(np.int64)
    slices = judgement.slices_of(
        _column(live, "num_events"),
        _column(live, "new_items").astype(bool),
        types,
        [scene for part in live for scene in part.scenes],
        dict(enumerate(NAMES)),
    )
    kept = Losses(
        _column(live, "loss_adapted")[ranked].astype(np.float64),
        numbers[ranked].astype(np.int64),
        {name: mask[ranked] for name, mask in slices.items()},
    )
    return judgement.paired(kept, _column(other, "loss_adapted")[ranked].astype(np.float64), rules)


def _column(parts: Sequence[Prequential], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(part, name) for part in parts]) if parts else np.zeros(0)
