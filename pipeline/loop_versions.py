"""The versions that a worker has in use: laid out in another thread, changed between two batches.

A worker holds the live version, and beside it a canary on some partitions. Users and item statistics are shared: a
partition is adapted under one version at a time, and which one is recorded with the offset from which it holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray
from torch import Tensor

from models.checkpoint import ArtefactRefused
from models.meta_parameters import MetaParameters
from models.ranker import Ranker
from pipeline.adaptation import Adaptation
from pipeline.catalogue import Catalogue, ListedItem, build_catalogue, listed_rows
from pipeline.store import Heads
from schemas.errors import ConfigurationError

log = structlog.get_logger()

AGAIN_SECONDS = 10.0  # until a version that could not be loaded is tried again

StateMaps = Mapping[int, NDArray[np.float64]]


def _no_maps(_: int) -> StateMaps:
    return {}


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a version's parameters come from, the text embeddings [N, T] that they expect, and its state maps.

    `state_maps` gives, by earlier version, the matrix [F of it, F] that carries a user's inner state over.
    """

    parameters: Callable[[int], MetaParameters]
    embeddings: Callable[[Sequence[str], MetaParameters], Tensor]
    state_maps: Callable[[int], StateMaps] = field(default=_no_maps)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A version laid out over one snapshot, not yet in use."""

    parameters: MetaParameters
    state_maps: StateMaps
    ranker: Ranker
    catalogue: Catalogue


class Versions:
    """The adaptations in use, by version; `heads` says which partitions each holds."""

    def __init__(self, first: Adaptation, sources: Sources, refused: Callable[[int, str], None]) -> None:
        self.live = first
        self.heads = Heads(None, None, frozenset(), -1)
        self._in_use: dict[int, Adaptation] = {}
        self._loaded: dict[int, _Loaded] = {}
        self._sources, self._refused = sources, refused
        self._items: tuple[int, list[ListedItem]] = (-1, [])
        self._thread = ThreadPoolExecutor(1, "innerloop-versions")
        self._loading: dict[int, Future[_Loaded]] = {}
        self._failed: dict[int, float] = {}  # when a version could not be loaded

    def of(self, partition: int) -> Adaptation:
        """The adaptation of a partition."""
        version = self.heads.version_of(partition)
        return self.live if version is None else self._in_use[version]

    def groups(self, partitions: Iterable[int]) -> list[tuple[Adaptation, list[int]]]:
        """Partitions by their adaptation, the live one's first."""
        found: dict[int, tuple[Adaptation, list[int]]] = {}
        for partition in sorted(partitions):
            adaptation = self.of(partition)
            found.setdefault(id(adaptation), (adaptation, []))[1].append(partition)
        return sorted(found.values(), key=lambda group: group[0] is not self.live)

    def forget(self, partition: int) -> None:
        """Drop what is remembered of a partition, under every version."""
        for adaptation in {id(one): one for one in (self.live, *self._in_use.values())}.values():
            adaptation.forget(partition)

    def follow(
        self, wanted: Heads, read_items: Callable[[], tuple[int, list[ListedItem]]], *, wait: bool = False
    ) -> bool:
        """Take the wanted versions and snapshot into use as far as they are there; True when something changed.

        A version is loaded in another thread; with `wait` what is missing is waited for. A new snapshot is laid out at
        once, because the events to come name its items. Raises what the first version's loading raised.
        """
        if wanted.snapshot != self._items[0]:
            self._items = read_items()
        live = self.heads.live
        if wanted.live is not None and self._is_there(wanted.live, wait=wait):
            live = wanted.live
        has_canary = wanted.canary is not None and self._is_there(wanted.canary, wait=wait)
        partitions = wanted.canary_partitions if has_canary else frozenset[int]()
        heads = Heads(live, wanted.canary if has_canary else None, partitions, self._items[0])
        if live is None or heads == self.heads:
            return False
        self._switch(heads, live)
        return True

    def _is_there(self, version: int, *, wait: bool) -> bool:
        if version in self._loaded:
            return True
        if time.monotonic() < self._failed.get(version, -AGAIN_SECONDS) + AGAIN_SECONDS:
            return False
        if version not in self._loading:
            self._loading[version] = self._thread.submit(self._load, version)
        if not (wait or self._loading[version].done()):
            return False
        try:
            self._loaded[version] = self._loading.pop(version).result()
        except (ArtefactRefused, ConfigurationError, ValueError, OSError) as error:
            self._refuse(version, error)
            if self.heads.live is None:
                raise  # there is nothing to go on with
            return False
        return True

    def _refuse(self, version: int, error: Exception) -> None:
        first = version not in self._failed
        self._failed[version] = time.monotonic()
        if first:
            log.error("a version is not taken into use", meta_version=version, reason=str(error))
            self._refused(version, str(error))

    def _load(self, version: int) -> _Loaded:
        snapshot, items = self._items
        parameters = self._sources.parameters(version)
        return self._laid_out(parameters, self._sources.state_maps(version), snapshot, items)

    def _laid_out(
        self, parameters: MetaParameters, state_maps: StateMaps, snapshot: int, items: Sequence[ListedItem]
    ) -> _Loaded:
        embeddings = self._sources.embeddings([item.text for item in listed_rows(items)], parameters)
        catalogue = build_catalogue(snapshot, items, embeddings, parameters)
        if parameters.pairs_online:
            _ = catalogue.tables.predicted  # now, and not when the first events wait for it
        return _Loaded(parameters, state_maps, Ranker(parameters, catalogue.tables), catalogue)

    def _switch(self, heads: Heads, live: int) -> None:
        snapshot, items = self._items
        in_use: dict[int, Adaptation] = {}
        unused = [] if self._in_use else [self.live]
        for version in (live, *([] if heads.canary is None else [heads.canary])):
            loaded = self._loaded[version]
            if loaded.catalogue.snapshot != snapshot:
                loaded = self._laid_out(loaded.parameters, loaded.state_maps, snapshot, items)
                self._loaded[version] = loaded
            adaptation = self._in_use.get(version) or (unused.pop() if unused else self.live.beside())
            adaptation.activate(version, loaded.ranker, loaded.catalogue, loaded.state_maps)
            in_use[version] = adaptation
        self._in_use, self.live, self.heads = in_use, in_use[live], heads
        self._loaded = {version: self._loaded[version] for version in in_use}
        self._failed = {version: at for version, at in self._failed.items() if version not in in_use}
        log.info("in use", meta_version=live, canary=heads.canary, snapshot=snapshot, items=len(items))
