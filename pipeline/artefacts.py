"""Where artefacts lie: a folder, or an object store that fsspec knows, named by the hash of their bytes.

Whole or not at all: in a folder by a temporary file that is flushed and renamed, elsewhere by one put of a key that
nothing else ever writes. A name is made from a hash only, so no text from a database becomes a path.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.failpoints import reach
from schemas.errors import ConfigurationError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".writing-"
_EXTRAS = {"s3": "s3", "s3a": "s3"}  # of innerloop, by scheme
_CLIENTS = {"aiobotocore", "aiohttp", "botocore"}  # whose errors of the network are no OSError


class ArtefactMissing(ConfigurationError):
    """A version's file is not where artefacts lie: copy it from where it was trained, or train anew."""


class ArtefactsUnavailable(OSError):
    """The object store does not answer, or not to these credentials: check its address and keys, then try again."""


class Artefacts:
    """Content-addressed files below one folder or URL (`s3://bucket/prefix`, `memory://…`).

    Object stores take their address and keys from the environment, as their own tools do: AWS_ENDPOINT_URL,
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE ….
    """

    def __init__(self, place: str | Path) -> None:
        """Open nothing yet, except the client that the URL's scheme asks for.

        Raises ConfigurationError for a scheme that is unknown or whose package is not installed.
        """
        try:
            self._files, self._root = fsspec.url_to_fs(str(place))
        except ImportError as error:
            extra = _EXTRAS.get(str(place).partition("://")[0])
            wanted = f"pip install 'innerloop[{extra}]'" if extra else str(error)
            raise ConfigurationError(f"INNERLOOP_ARTEFACTS={place} needs a missing package: {wanted}") from error
        except ValueError as error:
            raise ConfigurationError(f"INNERLOOP_ARTEFACTS={place}: {error}") from error
        self._is_folder = isinstance(self._files, LocalFileSystem)

    def place(self, sha256: str) -> str:
        """Return where the artefact with this hash lies. Raises ArtefactMissing for what is no hash."""
        if not _SHA256.fullmatch(sha256):
            raise ArtefactMissing(f"{sha256[:80]!r} is not a SHA-256")
        return f"{self._root.rstrip('/')}/{sha256}.safetensors"

    def read(self, sha256: str) -> bytes:
        """Return the bytes under this name, whatever they are. Raises ArtefactMissing, OSError."""
        place = self.place(sha256)
        try:
            with self._reachable():
                payload: bytes = self._files.cat_file(place)
        except FileNotFoundError:
            raise ArtefactMissing(
                f"{self._files.unstrip_protocol(place)} is not there: copy it from where it was trained, point "
                "INNERLOOP_ARTEFACTS (or INNERLOOP_HOME) there, or run `innerloop meta-train`"
            ) from None
        return payload

    def write(self, sha256: str, payload: bytes) -> None:
        """Put the bytes under their hash; what is there already, whole, stays. Raises OSError."""
        place = self.place(sha256)
        with self._reachable():
            if self._files.exists(place) and hashlib.sha256(self._files.cat_file(place)).hexdigest() == sha256:
                return
            if self._is_folder:
                self._write_file(Path(place), payload)
            else:
                reach("mid_artifact_write")
                self._files.pipe_file(place, payload)

    def remove(self, sha256: str) -> None:
        """Delete the artefact with this hash, and what a killed writer left of it."""
        place = self.place(sha256)
        with self._reachable():
            if self._files.exists(place):
                self._files.rm_file(place)
        if self._is_folder:
            for left in Path(place).parent.glob(f"{_TEMPORARY}{sha256}-*"):
                left.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names of everything that lies there, unfinished files included."""
        if not self._files.exists(self._root):
            return []
        return sorted(name.rsplit("/", 1)[-1] for name in self._files.ls(self._root, detail=False, refresh=True))

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as refused:
            if self._is_folder:
                raise
            raise ArtefactsUnavailable(self._unanswered(refused)) from refused
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in _CLIENTS:
                raise
            raise ArtefactsUnavailable(self._unanswered(error)) from error

    def _unanswered(self, error: Exception) -> str:
        where = self._files.unstrip_protocol(self._root)
        return f"{where} does not answer ({error}): check AWS_ENDPOINT_URL and the keys, or INNERLOOP_ARTEFACTS"

    @staticmethod
    def _write_file(path: Path, payload: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{_TEMPORARY}{path.stem}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(payload[: len(payload) // 2])
                reach("mid_artifact_write")
                file.write(payload[len(payload) // 2 :])
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide it from a worker that runs as another user
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
