"""Text embeddings, computed once per (encoder, text) and kept in one SQLite file.

The file is only a cache: it may be deleted at any time, two processes may use it at once, and a damaged one is
replaced by an empty one.  Embeddings do not depend on what is encoded beside them (models/encoder.py), so a cached
catalogue and a fresh one are equal to the bit.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.encoder import TextEncoder

FILE_NAME = "embeddings.sqlite"
CHUNK = 128
LOCK_SECONDS = 30.0

_FAULTS_OF_THE_PLACE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)
_CREATE = """
CREATE TABLE IF NOT EXISTS embeddings (
    encoder TEXT NOT NULL, text_sha256 BLOB NOT NULL, vector BLOB NOT NULL, vector_sha256 BLOB NOT NULL,
    PRIMARY KEY (encoder, text_sha256)
) WITHOUT ROWID
"""
_READ = "SELECT vector, vector_sha256 FROM embeddings WHERE encoder = ? AND text_sha256 = ?"
# Another process may have written the same vector meanwhile: either is right.
_WRITE = "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)"


def cached_embeddings(
    encoder: TextEncoder,
    texts: Sequence[str],
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Texts → [N, T] float32 unit rows, encoding only the texts that the cache lacks.

    `progress(done, total)` counts the texts that had to be encoded; it is not called when there were none.
    A cache that cannot be used (damaged, read-only, locked for 30 s) costs time, never the result.
    """
    keys = [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in texts]
    known = _read(cache_dir, encoder, set(keys))
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    # By length, because the encoder pads the texts of one call to common widths.
    order = sorted(missing, key=lambda key: len(missing[key]))
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        fresh = dict(zip(chunk, encoder.encode([missing[key] for key in chunk]), strict=True))
        # Written chunk by chunk, so that an interrupted first run is not lost.
        _write(cache_dir, encoder, fresh)
        known |= fresh
        if progress is not None:
            progress(start + len(chunk), len(order))
    return torch.stack([known[key] for key in keys]) if keys else torch.zeros(0, encoder.size)


def _read(cache_dir: Path, encoder: TextEncoder, keys: set[bytes]) -> dict[bytes, Tensor]:
    """The vectors that the cache holds, whole and of the right size; nothing where it cannot be read."""
    path = cache_dir / FILE_NAME
    if not path.exists():
        return {}
    found = {}
    try:
        with _opened(path) as cache:
            for key in keys:
                for vector, vector_sha256 in cache.execute(_READ, (encoder.name, key)):
                    if len(vector) == 4 * encoder.size and hashlib.sha256(vector).digest() == vector_sha256:
                        found[key] = torch.frombuffer(bytearray(vector), dtype=torch.float32)
    except sqlite3.Error as error:
        _discard_if_damaged(path, error)
        return {}
    return found


def _write(cache_dir: Path, encoder: TextEncoder, vectors: dict[bytes, Tensor]) -> None:
    rows = []
    for key, vector in vectors.items():
        blob = vector.contiguous().numpy().astype("<f4").tobytes()
        rows.append((encoder.name, key, blob, hashlib.sha256(blob).digest()))
    path = cache_dir / FILE_NAME
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _opened(path) as cache, cache:
            cache.executemany(_WRITE, rows)
    except sqlite3.Error as error:
        _discard_if_damaged(path, error)
    except OSError:
        return  # the folder cannot be made; the vectors in hand are right all the same


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to the cache with its table; waits for another process's lock."""
    cache = sqlite3.connect(path, timeout=LOCK_SECONDS)
    try:
        cache.execute(_CREATE)
        yield cache
    finally:
        cache.close()


def _discard_if_damaged(path: Path, error: sqlite3.Error) -> None:
    """Moves the file away, unless the error says that the place is at fault and not the content.

    Moved and not overwritten: another process may have it open.  Should that process then write into the moved file,
    or leave a journal that fits no file, the sums beside the vectors show it, and the cache is rebuilt once more.
    """
    if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _FAULTS_OF_THE_PLACE:
        return
    for suffix in ("", "-journal"):
        damaged = path.with_name(path.name + suffix)
        with suppress(FileNotFoundError):  # the other process was faster
            damaged.replace(damaged.with_name(damaged.name + ".damaged"))
