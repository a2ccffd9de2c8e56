"""Lines of a file to feed: JSON Lines or CSV, plain or gzipped, or Parquet; from a path or standard input."""

from __future__ import annotations

import csv
import gzip
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Literal, cast

import msgspec

from schemas.errors import ConfigurationError

Format = Literal["jsonl", "csv", "parquet"]
_GZIP_MAGIC = b"\x1f\x8b"
_ROW_BATCH = 4096


class InputUnreadable(ConfigurationError):
    """The input file is missing, unreadable or not what its name says: correct the path or the format."""


@dataclass(frozen=True)
class Line:
    """One line of input: JSON bytes, the cells of a CSV row by column name, or what is wrong with the row."""

    number: int
    content: bytes | dict[str, str] | None
    fault: str = ""


class Source:
    """An opened input: iterate it for its lines; `fraction` says how much of a file has been read."""

    def __init__(self, raw: BinaryIO, num_bytes: int | None, kind: Format) -> None:
        self._raw, self._num_bytes, self._kind = raw, num_bytes, kind

    def __iter__(self) -> Iterator[Line]:
        if self._kind == "parquet":
            yield from _parquet_lines(self._raw)
            return
        buffered = (
            self._raw if isinstance(self._raw, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, self._raw))
        )
        zipped = buffered.peek(2)[:2] == _GZIP_MAGIC
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=buffered) if zipped else buffered)
        try:
            yield from _csv_lines(stream) if self._kind == "csv" else _json_lines(stream)
        except (OSError, EOFError) as broken:  # gzip says both for a file that is cut short
            raise InputUnreadable(f"the input ends unreadable: {broken}") from broken

    def fraction(self) -> float | None:
        """Return the share of the file's bytes read so far, or None where its size is unknown."""
        if not self._num_bytes:
            return None
        return min(1.0, self._raw.tell() / self._num_bytes)


@contextmanager
def open_source(path: str, kind: Format | None = None) -> Iterator[Source]:
    """Open a path, or `-` for standard input; the name's ending tells .csv, .csv.gz and .parquet, else JSON Lines.

    Raises InputUnreadable.
    """
    chosen = kind or _BY_ENDING.get(Path(path.removesuffix(".gz")).suffix, "jsonl")
    if path == "-":
        yield Source(sys.stdin.buffer, None, chosen)
        return
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below, but a failed open has its own message
    except OSError as error:
        raise InputUnreadable(f"{path}: {error.strerror}") from error
    with file:
        status = os.fstat(file.fileno())
        yield Source(file, status.st_size if stat.S_ISREG(status.st_mode) else None, chosen)


_BY_ENDING: dict[str, Format] = {".csv": "csv", ".parquet": "parquet"}


def _parquet_lines(file: BinaryIO) -> Iterator[Line]:
    """Rows as the JSON objects that their columns say; times become RFC 3339, those without a zone in UTC."""
    if find_spec("pyarrow") is None:
        raise InputUnreadable("Parquet is read with pyarrow: pip install 'innerloop[parquet]', or give CSV")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(_ROW_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield Line(number, msgspec.json.encode({name: _zoned(cell) for name, cell in row.items()}))
    except (pyarrow.ArrowException, OSError) as broken:
        raise InputUnreadable(f"not a readable Parquet file: {broken}") from broken


def _zoned(cell: object) -> object:
    return cell.replace(tzinfo=UTC) if isinstance(cell, datetime) and cell.tzinfo is None else cell


def _json_lines(stream: BinaryIO) -> Iterator[Line]:
    for number, raw in enumerate(stream, 1):
        content = raw.strip()
        if content:
            yield Line(number, content)


def _csv_lines(stream: BinaryIO) -> Iterator[Line]:
    # Escaped and not replaced: a bad byte must be found, and must not end the reading of the rest.
    reader = csv.DictReader(raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff") for raw in stream)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Line(reader.line_num, None, str(error))
            continue
        if None in row:
            yield Line(reader.line_num, None, f"more cells than the header's {len(reader.fieldnames or ())} columns")
        else:
            yield Line(reader.line_num, {name: cell for name, cell in row.items() if cell})
