"""The wiring of `meta-train`: past interactions and texts → outer loop → artefact and row."""

from __future__ import annotations

import sys
import time
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import table_fitting
from models.encoder import TextEncoder, resolve_encoder
from models.episodes import Interactions
from models.learner_tuning import Method
from models.meta_parameters import MetaParameters
from models.outer_loop import meta_train
from models.recipe import DEFAULT, Recipe
from pipeline import registry, training_data
from pipeline.adaptation import Types
from pipeline.artefacts import Artefacts
from pipeline.embeddings import cached_embeddings
from pipeline.recipes import read_recipe
from pipeline.settings import Settings
from pipeline.stages import Stages, stages
from pipeline.training_data import Columns, Window
from schemas.database import check_role, check_schema, connect_engine
from schemas.errors import ConfigurationError
from schemas.mapping import load_mapping


@dataclass(frozen=True)
class Trained:
    """The result of one meta-training."""

    registered: registry.Registered
    num_events: int
    num_users: int
    num_items: int
    rejected: dict[str, int]
    report: dict[str, Any]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        counts = {"events": self.num_events, "users": self.num_users, "items": self.num_items}
        seconds = round(self.seconds, 1)
        return {**self.registered.__dict__, **counts, "rejected": self.rejected, "seconds": seconds, **self.report}

    def as_text(self) -> str:
        """Return a few lines for people."""
        kept = self.registered
        figures = [f"  {name}: {_shown(value)}" for name, value in self.report.items() if _is_figure(value)]
        return "\n".join(
            [
                f"version {kept.version} is {kept.status} ({kept.encoder}, sha256 {kept.sha256[:12]}…)",
                f"learnt from {self.num_events:,} positive events of {self.num_users:,} users with "
                f"{self.num_items:,} items in {self.seconds:.0f} s",
                *figures,
            ]
        )


def run(
    settings: Settings,
    *,
    interactions_file: str | None,
    items_file: str | None,
    mapping_file: Path | None = None,
    seed: int = 0,
    method: Method = Method(),  # noqa: B008  # a constant of strings
    recipe: Recipe = DEFAULT,
) -> Trained:
    """Read, encode, meta-train, register. Without a file the topics are read.

    Raises ConfigurationError for what an operator has to correct, and BrokerUnavailable.
    """
    started = time.monotonic()
    engine = connect_engine(settings.database("writer"))
    check_schema(engine)
    check_role(engine, "writer")
    with stages() as progress:
        # The catalogue first: what is wrong with it is told before a long history is read.
        texts = _texts(settings, items_file)
        window = _window(settings, interactions_file, mapping_file, progress)
        _tell_missing(set(window.items), texts)
        learnt = learn(settings, window, texts, seed=seed, method=method, recipe=recipe, progress=progress)
    columns = learnt.columns
    registered = registry.register(
        engine,
        Artefacts(settings.artefacts_place()),
        learnt.parameters,
        metrics=learnt.report,
        provenance=provenance(settings, interactions_file, columns, seed),
    )
    engine.dispose()
    counts = len(columns.users), columns.num_users, len(columns.item_ids)
    return Trained(registered, *counts, dict(window.rejected), learnt.report, time.monotonic() - started)


@dataclass(frozen=True)
class Learnt:
    """Parameters, what validation found, and what they were learnt from."""

    parameters: MetaParameters
    report: dict[str, Any]
    columns: Columns


def learn(
    settings: Settings,
    window: Window,
    texts: dict[str, str],
    *,
    progress: Stages,
    seed: int = 0,
    method: Method = Method(),  # noqa: B008  # a constant of strings
    recipe: Recipe = DEFAULT,
    beginning: MetaParameters | None = None,
) -> Learnt:
    """Encode the texts and meta-train on a window. Raises NothingToLearn."""
    columns = training_data.numbered(window)
    encoder = resolve_encoder(settings.encoder, device=settings.device)
    parameters, report = meta_train(
        table_fitting.Window(
            _interactions(columns),
            _embeddings(encoder, columns.item_ids, texts, settings.home, progress),
            item_ids=columns.item_ids,
            encoder=encoder.name,
            seed=seed,
            support_size=settings.support_size,
            recipe=recipe,
        ),
        method=method,
        beginning=beginning,
        progress=progress,
    )
    return Learnt(parameters, report, columns)


def recipe_named(settings: Settings, name: str | None) -> Recipe:
    """The recipe of a name or file, the defaults for None. Raises ConfigurationError, which names the entry."""
    if name is None:
        return DEFAULT
    try:
        return Recipe.of(read_recipe(settings.home, name))
    except ValueError as error:
        raise ConfigurationError(f"recipe {name}: {error}") from None


def method_of(parameters: MetaParameters) -> Method:
    """Return how a version adapts its users."""
    return Method(parameters.learner, parameters.adapter)


def weight_of_types(settings: Settings) -> NDArray[np.float32]:
    """Return the weight by type code; 0 for what is not a positive."""
    types = Types.of(settings.event_types)
    return types.weight * types.positive


def _window(settings: Settings, path: str | None, mapping_file: Path | None, progress: Stages) -> Window:
    # A topic is read as its workers read it; a file brings its own mapping.
    chosen = mapping_file or (None if path else settings.mapping)
    mapping = load_mapping(chosen) if chosen else None
    if path:
        events = training_data.events_of_file(path, mapping)
    else:
        broker = settings.broker_address()
        erased = training_data.erasures_of_topic(broker, settings.topic_erasures)
        events = training_data.events_of_topic(broker, settings.topic_interactions, mapping, erased=erased)
    window = training_data.collect(events, weight_of_types(settings), lambda done: progress("read events", done, None))
    progress("read events", len(window.users), len(window.users))
    return window


def _texts(settings: Settings, path: str | None) -> dict[str, str]:
    if path:
        return training_data.texts_of_file(path)
    try:
        broker = settings.broker_address()
    except ConfigurationError as missing:
        raise ConfigurationError(f"no catalogue: give --items FILE, or let its topic be read: {missing}") from None
    return training_data.texts_of_topic(broker, settings.topic_items)


def _tell_missing(items: Set[str], texts: dict[str, str]) -> None:
    """Say before the long part that texts are missing: it may be a forgotten option, or a catalogue never fed."""
    missing = len(items - texts.keys())
    if missing:
        print(
            f"{missing:,} of {len(items):,} items have no text and teach nothing about new ones: "
            "give --items FILE, or feed them with `innerloop items`",
            file=sys.stderr,
        )


def _embeddings(
    encoder: TextEncoder, item_ids: tuple[str, ...], texts: dict[str, str], home: Path, progress: Stages
) -> Tensor:
    """Return [N, T]: zeros where the catalogue does not know the item, so that it teaches nothing about texts."""
    rows = [row for row, item_id in enumerate(item_ids) if item_id in texts]
    known = [texts[item_ids[row]] for row in rows]
    embeddings = torch.zeros(len(item_ids), encoder.size)
    if rows:
        embeddings[torch.tensor(rows)] = cached_embeddings(
            encoder, known, home / "cache", lambda done, total: progress("encode texts", done, total)
        )
    return embeddings


def _interactions(columns: Columns) -> Interactions:
    return Interactions(
        torch.from_numpy(columns.users),
        torch.from_numpy(columns.items),
        torch.from_numpy(columns.times),
        torch.from_numpy(columns.weights),
        len(columns.item_ids),
    )


def provenance(settings: Settings, path: str | None, columns: Columns, seed: int) -> dict[str, Any]:
    """Return where a version came from, for its row; without a path it is the topic."""
    return {
        # A name and no path: the row is read by people who do not share this machine.
        "interactions": Path(path).name if path else f"topic {settings.topic_interactions}",
        "events": len(columns.users),
        "users": columns.num_users,
        "items": len(columns.item_ids),
        "first_ts_ms": int(columns.times[0]),
        "last_ts_ms": int(columns.times[-1]),
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _is_figure(value: Any) -> bool:
    """Tables stay in the row; people get single figures and (mean, low, high)."""
    return isinstance(value, str | int | float) or _is_interval(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(one, float) for one in value)


def _shown(value: Any) -> str:
    if _is_interval(value):
        return f"{value[0]:.4f} [{value[1]:.4f}, {value[2]:.4f}]"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
