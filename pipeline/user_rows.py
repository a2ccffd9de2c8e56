"""The rows of one micro-batch in Postgres' binary COPY format, straight from the arrays that hold them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.binary_copy import (
    BOOL,
    FLOAT4,
    FLOAT8,
    INT2,
    INT4,
    INT8,
    Column,
    Ragged,
    Scalar,
    binary_copy,
    text,
    text_array,
)
from pipeline.outcome import Outcome
from pipeline.support import Ints, Segments, UserTable, tail_length
from schemas.event_types import CODES

_POSTGRES_EPOCH = 946_684_800  # 2000-01-01 in Unix seconds


def states_copy(outcome: Outcome, table: UserTable) -> io.BytesIO:
    """Rows of `user_state` for the users touched, in the order of `store.STATE_COLUMNS`."""
    slots, lists = outcome.slots, outcome.lists
    num_support = np.minimum(table.num_events[slots], table.support_items.shape[1])
    num_recent, num_seen = tail_length(table.num_applied[slots]), tail_length(table.num_seen[slots])
    adapter, track = table.adapter[slots, : outcome.state_size], table.track[slots, : outcome.track_size]
    return io.BytesIO(
        binary_copy(
            [
                text(table.user_ids(slots)),
                Scalar(table.partition[slots], INT4),
                Scalar(table.last_offset[slots], INT8),
                Scalar(table.num_events[slots], INT4),
                Scalar(table.num_applied[slots], INT4),
                Ragged(table.support_items[slots], num_support, INT4, right=True),
                Ragged(table.support_types[slots], num_support, INT2, right=True),
                Ragged(adapter, np.full(len(slots), adapter.shape[1]), FLOAT4),
                Ragged(track, np.full(len(slots), track.shape[1]), FLOAT4),
                Scalar(table.adapter_events[slots], INT4),
                Scalar(table.adapter_use[slots], INT2),
                Scalar(table.meta_version[slots], INT4),
                Ragged(lists.item_nos, lists.lengths, INT4),
                Ragged(lists.scores, lists.lengths, FLOAT8),
                Ragged(table.recent_ids[slots], num_recent, INT8),
                Ragged(table.recent_bodies[slots], num_recent, INT4),
                Ragged(table.recent_seen[slots], num_seen, INT4),
                Scalar(table.num_seen[slots], INT4),
                Scalar(table.due_us[slots], INT8),
            ]
        )
    )


def segments_copy(segments: Segments) -> io.BytesIO:
    """Rows (user_id, segment, one array per column of the log)."""
    kinds = {np.dtype(np.int64): INT8, np.dtype(np.int32): INT4}
    columns = [np.stack(column) for column in zip(*segments.entries, strict=True)]
    arrays = [Ragged(column, np.full(len(column), column.shape[1]), kinds[column.dtype]) for column in columns]
    return io.BytesIO(binary_copy([text(segments.user_ids), Scalar(np.array(segments.numbers), INT4), *arrays]))


def prequential_copy(outcome: Outcome, *, recorded_at: float) -> io.BytesIO:
    """One row of `prequential` for each partition with applied events. recorded_at: Unix seconds."""
    record = outcome.prequential
    partitions = np.array(sorted(record.applied_types), np.int64)
    start, ends = (np.searchsorted(record.partition, partitions, side=side) for side in ("left", "right"))
    lengths = ends - start
    moved = {advance.partition: advance for advance in outcome.batch.advances}
    num = len(partitions)

    def array(values: NDArray[np.generic], kind: tuple[str, int]) -> Ragged:
        padded = np.zeros((num, int(lengths.max())), values.dtype)
        for row, first, length in zip(padded, start, lengths, strict=True):
            row[:length] = values[first : first + length]
        return Ragged(padded, lengths, kind)

    def number(name: str) -> Ints:
        return np.array([getattr(moved[partition], name) for partition in partitions.tolist()], np.int64)

    scenes = [_numbered(record.scenes[first:end]) for first, end in zip(start, ends, strict=True)]
    columns: list[Column] = [
        text([outcome.batch.advances[0].topic] * num),
        Scalar(partitions, INT4),
        Scalar(number("start"), INT8),
        Scalar(number("next_offset"), INT8),
        Scalar(np.full(num, round((recorded_at - _POSTGRES_EPOCH) * 1e6)), INT8),
        Scalar(np.full(num, outcome.version), INT4),
        array(record.offset, INT8),
        array(record.record_ms, INT8),
        text_array([record.user_ids[first:end] for first, end in zip(start, ends, strict=True)]),
        array(record.item_nos, INT4),
        array(record.types, INT2),
        array(record.num_events, INT4),
        array(record.loss_adapted, FLOAT4),
        array(record.loss_start, FLOAT4),
        array(record.rank_adapted, INT4),
        array(record.rank_start, INT4),
        array(record.rank_popular, INT4),
        array(record.event_ms, INT8),
        array(record.new_items, BOOL),
        array(np.array([number for numbers, _ in scenes for number in numbers], np.int16), INT2),
        text_array([names for _, names in scenes]),
        Ragged(np.stack([record.applied_types[p] for p in partitions.tolist()]), np.full(num, len(CODES)), INT4),
    ]
    return io.BytesIO(binary_copy(columns))


def _numbered(scenes: Sequence[str | None]) -> tuple[list[int], list[str]]:
    """Each scene's place in the list of those that occur, from 1; 0 for none. A batch has few."""
    names = sorted({scene for scene in scenes if scene is not None})
    place: dict[str | None, int] = {None: 0} | {name: number for number, name in enumerate(names, 1)}
    return [place[scene] for scene in scenes], names
