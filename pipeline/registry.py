"""Meta versions: artefacts in the home folder, named by their hash, and their rows in `meta_versions`.

An artefact is on disk, whole, before its row exists; a row is found by number and its file by hash, so no text from
the database ever becomes a path.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, text

from models import checkpoint
from models.meta_parameters import MetaParameters
from schemas.errors import ConfigurationError
from schemas.tables import meta_versions

REGISTRATION_LOCK = 0x696E_6E65_726C_7270  # advisory: the first of two concurrent registrations becomes live
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NoLiveVersion(Exception):
    """Nothing was meta-trained yet: run `innerloop meta-train`; a worker waits until a version is live."""


class ArtefactMissing(ConfigurationError):
    """A version's file is not in this home folder: copy `artefacts/` from where it was trained, or train anew."""


@dataclass(frozen=True)
class Registered:
    """One row of `meta_versions`: what identifies a version."""

    version: int
    status: str
    sha256: str
    encoder: str


def register(
    engine: Engine,
    home: Path,
    parameters: MetaParameters,
    *,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Registered:
    """Write the artefact and its row; the first version becomes live, later ones are challengers.

    Raises models.checkpoint.ArtefactRefused, before anything is written, for parameters that must not be served.
    """
    payload = checkpoint.to_bytes(parameters)
    sha256 = hashlib.sha256(payload).hexdigest()
    write_artefact(home, sha256, payload)
    row = {
        "artefact": f"artefacts/{sha256}.safetensors",
        "sha256": sha256,
        "encoder": parameters.encoder,
        "metrics": dict(metrics),
        "provenance": dict(provenance),
    }
    with engine.begin() as connection:
        connection.execute(select(func.pg_advisory_xact_lock(REGISTRATION_LOCK)))
        parent = _live_version(connection)
        status = "live" if parent is None else "challenger"
        live_since = text("now()") if parent is None else None
        statement = insert(meta_versions).values(**row, parent=parent, status=status, live_since=live_since)
        version = connection.execute(statement.returning(meta_versions.c.version)).scalar_one()
    return Registered(version, status, sha256, parameters.encoder)


def live_version(engine: Engine) -> int | None:
    """Return the number of the live version, or None; cheap enough to poll."""
    with engine.connect() as connection:
        return _live_version(connection)


def load_live(engine: Engine, home: Path) -> tuple[int, MetaParameters]:
    """Return the live version's number and its verified parameters (on the CPU).

    Raises NoLiveVersion, or what `load` raises.
    """
    version = live_version(engine)
    if version is None:
        raise NoLiveVersion("no meta version is live: run `innerloop meta-train`")
    return version, load(engine, home, version)


def load(engine: Engine, home: Path, version: int) -> MetaParameters:
    """Return the verified parameters of one version, whatever its status.

    Raises ArtefactMissing without its file, models.checkpoint.ArtefactRefused when the bytes are not those registered.
    """
    with engine.connect() as connection:
        query = select(meta_versions.c.sha256).where(meta_versions.c.version == version)
        sha256 = connection.execute(query).scalar_one_or_none()
    if sha256 is None:
        raise ArtefactMissing(f"meta version {version} is not registered in this database")
    path = artefact_path(home, sha256)
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        raise ArtefactMissing(
            f"meta version {version} needs {path}, which is not there: copy it from the home folder "
            "(INNERLOOP_HOME) of the machine that trained it, or run `innerloop meta-train`"
        ) from None
    return checkpoint.from_bytes(payload, sha256=sha256)


def artefact_path(home: Path, sha256: str) -> Path:
    """Return where the artefact with this hash lies below the home folder."""
    if not _SHA256.fullmatch(sha256):
        raise ArtefactMissing(f"{sha256[:80]!r} is not a SHA-256")
    return home / "artefacts" / f"{sha256}.safetensors"


def write_artefact(home: Path, sha256: str, payload: bytes) -> Path:
    """Write whole or not at all: a temporary file, flushed to disk, then renamed; the same hash is written once."""
    path = artefact_path(home, sha256)
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide it from a worker that runs as another user
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)
    return path


def _flush_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _live_version(connection: Connection) -> int | None:
    query = select(meta_versions.c.version).where(meta_versions.c.status == "live")
    return connection.execute(query).scalar_one_or_none()
