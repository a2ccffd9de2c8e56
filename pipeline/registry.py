"""Meta versions: artefacts named by their hash, their rows in `meta_versions`, and the maps between their states.

An artefact lies where it belongs, whole, before its row exists. That it is being written is recorded first, so that
what a killed trainer leaves behind is known and collected; files that this database never asked for are not touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert

from models import checkpoint
from models.meta_parameters import MetaParameters
from models.state_map import state_map
from pipeline.artefacts import ArtefactMissing, Artefacts
from pipeline.failpoints import reach
from schemas.errors import ConfigurationError
from schemas.tables import artefact_writes, meta_versions, state_maps

# Advisory, of the session: the first of two concurrent registrations becomes live, and nobody collects between them.
REGISTRATION_LOCK = 0x696E_6E65_726C_7270
ArtefactRefused = checkpoint.ArtefactRefused
# Why a version cannot be given to workers, or returned to.
UNREADABLE = (ArtefactMissing, ArtefactRefused)


class OtherEncoder(ConfigurationError):
    """A version expects texts encoded by another model: set INNERLOOP_ENCODER, or run `innerloop meta-train`."""


class NoLiveVersion(Exception):
    """Nothing was meta-trained yet: run `innerloop meta-train`; a worker waits until a version is live."""


@dataclass(frozen=True)
class Registered:
    """One row of `meta_versions`: what identifies a version."""

    version: int
    status: str
    sha256: str
    encoder: str


def register(
    engine: Engine,
    artefacts: Artefacts,
    parameters: MetaParameters,
    *,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    window_ms: tuple[int, int] | None = None,
    request: int | None = None,
) -> Registered:
    """Write the artefact and its row; the first version becomes live, later ones are challengers.

    A request that led to a version already gives that one. `window_ms` is the time [from, to) that was learnt from.
    Raises models.checkpoint.ArtefactRefused, before anything is written, for parameters that must not be served.
    """
    payload = checkpoint.to_bytes(parameters)
    sha256 = hashlib.sha256(payload).hexdigest()
    row: dict[str, Any] = {
        "artefact": f"artefacts/{sha256}.safetensors",
        "sha256": sha256,
        "encoder": parameters.encoder,
    }
    row |= {"metrics": dict(metrics), "provenance": dict(provenance), "request": request}
    row |= {"window_from_ms": window_ms and window_ms[0], "window_to_ms": window_ms and window_ms[1]}
    with _registering(engine) as connection:
        with connection.begin():
            if request is not None and (made := _of_request(connection, request)):
                return made
            connection.execute(insert(artefact_writes).values(sha256=sha256).on_conflict_do_nothing())
        artefacts.write(sha256, payload)
        reach("after_artifact_before_publish")
        with connection.begin():
            parent = _live_version(connection)
            status = "live" if parent is None else "challenger"
            row |= {"parent": parent, "status": status, "live_since": text("now()") if parent is None else None}
            row["reason"] = "the first version" if parent is None else "not judged yet"
            version = connection.execute(insert(meta_versions).values(row).returning(meta_versions.c.version))
            made = Registered(version.scalar_one(), status, sha256, parameters.encoder)
            connection.execute(delete(artefact_writes).where(artefact_writes.c.sha256 == sha256))
    return made


def collect_orphans(engine: Engine, artefacts: Artefacts) -> list[str]:
    """Delete artefacts whose writer was killed before their version was registered; gives their hashes."""
    with _registering(engine) as connection, connection.begin():
        registered = select(meta_versions.c.sha256)
        begun = set(connection.scalars(select(artefact_writes.c.sha256)))
        orphans = sorted(begun - set(connection.scalars(registered)))
        for sha256 in orphans:
            artefacts.remove(sha256)
        connection.execute(delete(artefact_writes).where(artefact_writes.c.sha256.in_(begun)))
    return orphans


def live_version(engine: Engine) -> int | None:
    """Return the number of the live version, or None; cheap enough to poll."""
    with engine.connect() as connection:
        return _live_version(connection)


def load_live(engine: Engine, artefacts: Artefacts) -> tuple[int, MetaParameters]:
    """Return the live version's number and its verified parameters (on the CPU).

    Raises NoLiveVersion, or what `load` raises.
    """
    version = live_version(engine)
    if version is None:
        raise NoLiveVersion("no meta version is live: run `innerloop meta-train`")
    return version, load(engine, artefacts, version)


def load(engine: Engine, artefacts: Artefacts, version: int) -> MetaParameters:
    """Return the verified parameters of one version, whatever its status.

    Raises ArtefactMissing without its file, models.checkpoint.ArtefactRefused when the bytes are not those registered.
    """
    with engine.connect() as connection:
        query = select(meta_versions.c.sha256).where(meta_versions.c.version == version)
        sha256 = connection.execute(query).scalar_one_or_none()
    if sha256 is None:
        raise ArtefactMissing(f"meta version {version} is not registered in this database")
    try:
        payload = artefacts.read(sha256)
    except ArtefactMissing as missing:
        raise ArtefactMissing(f"meta version {version}: {missing}") from None
    return checkpoint.from_bytes(payload, sha256=sha256)


def require_encoder(parameters: MetaParameters, encoder: str) -> None:
    """Raise OtherEncoder unless the version was trained on texts encoded by this one."""
    if encoder != parameters.encoder:
        raise OtherEncoder(
            f"the version was trained on texts encoded by {parameters.encoder}, INNERLOOP_ENCODER is {encoder}: "
            "set the same encoder, or run `innerloop meta-train` again"
        )


def map_states(engine: Engine, artefacts: Artefacts, source: int, target: int) -> None:
    """Record how users' states get from one version to another and back, unless that is recorded already.

    From versions before the source they get there by way of it. Raises what `load` raises.
    """
    pair = load(engine, artefacts, source), load(engine, artefacts, target)
    found = {(source, target): state_map(*pair), (target, source): state_map(*pair[::-1])}
    rows = [_map_row(of, to, fitted.matrix.numpy(), fitted.explained) for (of, to), fitted in found.items() if fitted]
    with engine.begin() as connection:
        if fitted := found[source, target]:
            earlier = select(state_maps).where(state_maps.c.target == source, state_maps.c.source != target)
            for row in connection.execute(earlier).all():
                by_way = _matrix(row) @ fitted.matrix.numpy()
                rows.append(_map_row(row.source, target, by_way, row.explained * fitted.explained))
        if rows:
            connection.execute(insert(state_maps).values(rows).on_conflict_do_nothing())


def load_state_maps(engine: Engine, version: int) -> dict[int, NDArray[np.float64]]:
    """Return the matrix [F, G] from each version whose states can be carried over to this one."""
    with engine.connect() as connection:
        rows = connection.execute(select(state_maps).where(state_maps.c.target == version)).all()
    return {row.source: _matrix(row) for row in rows}


@contextmanager
def _registering(engine: Engine) -> Iterator[Connection]:
    """A connection that nobody else registers or collects beside; killed, it lets go."""
    with engine.connect() as connection:
        connection.execute(select(func.pg_advisory_lock(REGISTRATION_LOCK)))
        connection.commit()
        try:
            yield connection
        finally:
            connection.rollback()
            connection.execute(select(func.pg_advisory_unlock(REGISTRATION_LOCK)))
            connection.commit()


def _of_request(connection: Connection, request: int) -> Registered | None:
    columns = meta_versions.c.version, meta_versions.c.status, meta_versions.c.sha256, meta_versions.c.encoder
    row = connection.execute(select(*columns).where(meta_versions.c.request == request)).one_or_none()
    return Registered(*row) if row else None


def _live_version(connection: Connection) -> int | None:
    query = select(meta_versions.c.version).where(meta_versions.c.status == "live")
    return connection.execute(query).scalar_one_or_none()


def _map_row(source: int, target: int, matrix: NDArray[np.float64], explained: float) -> dict[str, Any]:
    rows, cols = matrix.shape
    packed = np.ascontiguousarray(matrix).astype("<f8").tobytes()
    names = ("source", "target", "rows", "cols", "matrix", "explained")
    return dict(zip(names, (source, target, rows, cols, packed, explained), strict=True))


def _matrix(row: Any) -> NDArray[np.float64]:
    return np.frombuffer(row.matrix, "<f8").reshape(row.rows, row.cols).astype(np.float64)
