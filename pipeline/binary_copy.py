"""PostgreSQL's binary COPY format, built by numpy for thousands of rows at once.

A column is an array with one row per tuple, or `Ragged`: a padded matrix with the length of each row. All fields are
laid out in one byte matrix, each at the width of its column's longest; then the bytes that count are cut out, one
slice per ragged field. No Python object is made per value.

Format: https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format", and `array_send` for arrays.
Letters: U rows, X elements, W bytes of a column's longest field, its length word included.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]

# element type → (numpy big-endian type, type oid)
INT2, INT4, INT8 = (">i2", 21), (">i4", 23), (">i8", 20)
FLOAT4, FLOAT8 = (">f4", 700), (">f8", 701)
BOOL = ("|b1", 16)
TEXT_OID = 25
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
_WORD = 4  # bytes of a length
_ARRAY_HEAD, _EMPTY_ARRAY = 20, 12  # bytes; an empty array has no dimensions


@dataclass(frozen=True, slots=True)
class Scalar:
    """One number per row. values: [U]; kind: one of INT2 … BOOL."""

    values: NDArray[np.generic]
    kind: tuple[str, int]

    @property
    def width(self) -> int:
        """W."""
        return _WORD + np.dtype(self.kind[0]).itemsize

    def fill(self, block: Bytes) -> Counts | None:
        """Lay the fields out in the block [U, W]; gives how many bytes of each count (None: all)."""
        fields = _as_records(block, [("length", ">i4"), ("value", self.kind[0])])
        fields["length"], fields["value"] = self.width - _WORD, self.values[:, None]
        return None


@dataclass(frozen=True, slots=True)
class Ragged:
    """One array per row. values: [U, X]; lengths: [U], of which the first count (`right=True`: the last)."""

    values: NDArray[np.generic]
    lengths: NDArray[np.integer]
    kind: tuple[str, int]
    right: bool = False

    @property
    def width(self) -> int:
        """W."""
        return _WORD + _ARRAY_HEAD + int(self.lengths.max(initial=0)) * self._element

    @property
    def _element(self) -> int:
        return _WORD + np.dtype(self.kind[0]).itemsize

    def fill(self, block: Bytes) -> Counts | None:
        """Lay the fields out in the block [U, W]; gives how many bytes of each count (None: all)."""
        lengths = self.lengths.astype(np.int64)
        used = np.where(lengths > 0, _ARRAY_HEAD + lengths * self._element, _EMPTY_ARRAY)
        head = _as_records(block[:, : _WORD + _ARRAY_HEAD], [("words", ">i4", (6,))])["words"][:, 0]
        # dimensions, flags, element type; then elements in the one dimension, and its lower bound
        head[:, 0], head[:, 1], head[:, 2], head[:, 3], head[:, 4], head[:, 5] = (
            used, lengths > 0, 0, self.kind[1], lengths, 1,
        )  # fmt: skip
        if lengths.any():
            elements = _as_records(block[:, _WORD + _ARRAY_HEAD :], [("length", ">i4"), ("value", self.kind[0])])
            elements["length"], elements["value"] = self._element - _WORD, self._from_left(elements.shape[1])
        return used + _WORD

    def _from_left(self, longest: int) -> NDArray[np.generic]:
        """Values [U, longest] whose first ones count."""
        if not self.right:
            return self.values[:, :longest]
        width = self.values.shape[1]
        place = np.minimum(width - self.lengths[:, None] + np.arange(longest), width - 1)
        return np.take_along_axis(self.values, place, 1)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One field of bytes per row."""

    fields: list[bytes]

    @property
    def width(self) -> int:
        """W."""
        return _WORD + max(1, *map(len, self.fields))

    def fill(self, block: Bytes) -> Counts | None:
        """Lay the fields out in the block [U, W]; gives how many bytes of each count (None: all)."""
        lengths = np.fromiter(map(len, self.fields), np.int64, len(self.fields))
        _as_records(block[:, :_WORD], [("length", ">i4")])["length"] = lengths[:, None]
        width = self.width - _WORD
        block[:, _WORD:] = np.array(self.fields, f"S{width}").view(np.uint8).reshape(-1, width)
        return lengths + _WORD


Column = Scalar | Ragged | Encoded


def text(values: Sequence[str]) -> Encoded:
    """One string per row, without NUL."""
    return Encoded([value.encode() for value in values])


def text_array(values: Sequence[Sequence[str]]) -> Encoded:
    """One array of strings per row, without NUL."""
    return Encoded(list(map(_array_of_text, values)))


def binary_copy(columns: Sequence[Column]) -> bytes:
    """The whole stream for `COPY … FROM STDIN (FORMAT binary)`: header, one tuple per row, trailer.

    Args:
        columns: in the order of the COPY's column list, all with the same number U ≥ 1 of rows.

    """
    num_rows, widths = _num_rows(columns[0]), [column.width for column in columns]
    body = np.empty((num_rows, 2 + sum(widths)), np.uint8)
    body[:, :2] = np.frombuffer(len(columns).to_bytes(2, "big"), np.uint8)
    starts, ends, at = [np.zeros(num_rows, np.int64)], list[Counts](), 2
    for column, width in zip(columns, widths, strict=True):
        used = column.fill(body[:, at : at + width])
        if used is not None:
            ends.append(at + used)
            starts.append(np.full(num_rows, at + width))
        at += width
    ends.append(np.full(num_rows, at))
    rows = np.arange(num_rows)[:, None] * at
    laid_out = body.tobytes()
    cuts = zip((rows + np.stack(starts, 1)).ravel().tolist(), (rows + np.stack(ends, 1)).ravel().tolist(), strict=True)
    return b"".join([_HEADER, *(laid_out[start:end] for start, end in cuts), _TRAILER])


def _num_rows(column: Column) -> int:
    return len(column.fields if isinstance(column, Encoded) else column.values)


def _as_records(block: Bytes, fields: list[Any]) -> NDArray[np.void]:
    """The block [U, W] as records [U, W / size], to be written into."""
    return block.view(np.dtype(fields))


def _array_of_text(values: Sequence[str]) -> bytes:
    head = struct.pack(">iii", bool(values), 0, TEXT_OID)
    if not values:
        return head
    encoded = [value.encode() for value in values]
    return b"".join(
        [head, struct.pack(">ii", len(encoded), 1), *(len(one).to_bytes(4, "big") + one for one in encoded)]
    )
