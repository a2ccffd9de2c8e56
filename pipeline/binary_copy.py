"""PostgreSQL's binary COPY format, built by numpy for thousands of rows at once.

A column is an array with one row per tuple, or `Ragged`: a padded matrix with the length of each row. Every field is
laid out in a byte matrix of its largest width with a mask of the bytes that count; one boolean selection then packs
them. No Python object is made per value.

Format: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format", and `array_send` for arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]

# element type → (numpy big-endian type, type oid)
INT2, INT4, INT8 = (">i2", 21), (">i4", 23), (">i8", 20)
FLOAT4, FLOAT8 = (">f4", 700), (">f8", 701)
TEXT_OID = 25
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Scalar:
    """One number per row. values: [U]; kind: one of INT2 … FLOAT8."""

    values: NDArray[np.generic]
    kind: tuple[str, int]

    def fields(self) -> tuple[Bytes, Mask | None]:
        """Give the rows' bytes [U, W], lengths included, and which of them count (None: all)."""
        body = _as_bytes(self.values[:, None], self.kind[0])
        return _with_length(body, np.full(len(body), body.shape[1])), None


@dataclass(frozen=True, slots=True)
class Ragged:
    """One array per row. values: [U, X]; lengths: [U], of which the first count (`right=True`: the last)."""

    values: NDArray[np.generic]
    lengths: NDArray[np.integer]
    kind: tuple[str, int]
    right: bool = False

    def fields(self) -> tuple[Bytes, Mask | None]:
        """Give the rows' bytes [U, W], lengths included, and which of them count (None: all)."""
        num_rows, width = self.values.shape
        size = np.dtype(self.kind[0]).itemsize
        elements = np.empty((num_rows, width, 4 + size), np.uint8)
        elements[:, :, :4] = np.frombuffer(size.to_bytes(4, "big"), np.uint8)
        elements[:, :, 4:] = _as_bytes(self.values, self.kind[0]).reshape(num_rows, width, size)
        head = np.zeros((num_rows, 5), ">i4")
        head[:, 0], head[:, 2], head[:, 4] = self.lengths > 0, self.kind[1], 1
        head[:, 3] = self.lengths
        head_width = np.where(self.lengths > 0, 20, 12)  # an empty array has no dimensions: 12 bytes
        body = np.concatenate([head.view(np.uint8).reshape(num_rows, 20), elements.reshape(num_rows, -1)], 1)
        keep = np.ones(body.shape, bool)
        keep[:, 12:20] = (self.lengths > 0)[:, None]
        place = np.arange(width)[None]
        kept = place >= width - self.lengths[:, None] if self.right else place < self.lengths[:, None]
        keep[:, 20:] = np.repeat(kept, 4 + size, axis=1)
        lengths = head_width + self.lengths * (4 + size)
        return _with_length(body, lengths), np.concatenate([np.ones((num_rows, 4), bool), keep], 1)


@dataclass(frozen=True, slots=True)
class Text:
    """One string per row, without NUL."""

    values: Sequence[str]

    def fields(self) -> tuple[Bytes, Mask | None]:
        """Give the rows' bytes [U, W], lengths included, and which of them count (None: all)."""
        encoded = [value.encode() for value in self.values]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        width = max(1, int(lengths.max()))
        body = np.array(encoded, f"S{width}").view(np.uint8).reshape(len(encoded), width)
        keep = np.arange(width)[None] < lengths[:, None]
        return _with_length(body, lengths), np.concatenate([np.ones((len(encoded), 4), bool), keep], 1)


@dataclass(frozen=True, slots=True)
class TextArray:
    """One array of strings per row, without NUL."""

    values: Sequence[Sequence[str]]

    def fields(self) -> tuple[Bytes, Mask | None]:
        """Give the rows' bytes [U, W], lengths included, and which of them count (None: all)."""
        rows = [_text_array(row) for row in self.values]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        body = np.zeros((len(rows), int(lengths.max())), np.uint8)
        for target, row in zip(body, rows, strict=True):
            target[: len(row)] = np.frombuffer(row, np.uint8)
        keep = np.arange(body.shape[1])[None] < lengths[:, None]
        return _with_length(body, lengths), np.concatenate([np.ones((len(rows), 4), bool), keep], 1)


Column = Scalar | Ragged | Text | TextArray


def binary_copy(columns: Sequence[Column]) -> bytes:
    """The whole stream for `COPY … FROM STDIN (FORMAT binary)`: header, one tuple per row, trailer.

    Args:
        columns: in the order of the COPY's column list, all with the same number U ≥ 1 of rows.

    """
    parts = [column.fields() for column in columns]
    num_rows = len(parts[0][0])
    count = np.tile(np.frombuffer(len(columns).to_bytes(2, "big"), np.uint8), (num_rows, 1))
    body = np.concatenate([count, *(part for part, _ in parts)], 1)
    if all(mask is None for _, mask in parts):
        return _HEADER + body.tobytes() + _TRAILER
    keep = np.concatenate(
        [np.ones(count.shape, bool), *(np.ones(part.shape, bool) if mask is None else mask for part, mask in parts)], 1
    )
    packed: bytes = body[keep].tobytes()
    return _HEADER + packed + _TRAILER


def _text_array(values: Sequence[str]) -> bytes:
    head = struct.pack(">iii", bool(values), 0, TEXT_OID)
    if not values:
        return head
    encoded = [value.encode() for value in values]
    return b"".join(
        [head, struct.pack(">ii", len(encoded), 1), *(len(text).to_bytes(4, "big") + text for text in encoded)]
    )


def _as_bytes(values: NDArray[np.generic], dtype: str) -> Bytes:
    big_endian = np.ascontiguousarray(values.astype(dtype))
    return big_endian.view(np.uint8).reshape(len(values), -1)


def _with_length(body: Bytes, lengths: NDArray[np.integer]) -> Bytes:
    prefix = np.ascontiguousarray(lengths.astype(">i4")).view(np.uint8).reshape(len(body), 4)
    return np.concatenate([prefix, body], 1)
