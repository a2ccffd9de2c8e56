"""Pairs as rows: snapshots and log of `innerloop.pair_snapshots` and `innerloop.pair_log`, to and from bytes.

Letters: n items, M pairs kept per item, C counted parts, E events, W newest positives looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from models.item_fitting import COUNTED
from models.pair_counts import empty
from pipeline.item_statistics import OnlinePairs, PairEvents, SavedPairs

Row = tuple[Any, ...]


def snapshot_row(pairs: OnlinePairs) -> tuple[list[int], bytes, bytes, bytes, bytes, bytes]:
    """Columns item_nos, others, counts, scales, users, taken of the items that have a user or a pair.

    Pairs that are as their version brought them are not written again: no items stand for them, so that a change of
    versions does not make all partitions wait for megabytes.
    """
    table = empty(0, 0) if pairs.as_brought else pairs.table
    used = (table.users > 0) | (table.others >= 0).any(1)
    scales = torch.stack([table.scale[used], table.entered[used]], 2)
    taken = torch.stack([table.arrived[used], table.latest[used]], 1)
    columns = (table.others[used].to(torch.int32), table.counts[used], scales, table.users[used], taken)
    packed = (
        column.contiguous().numpy().astype(column.numpy().dtype.newbyteorder("<")).tobytes() for column in columns
    )
    others, counts, pair_scales, users, times = packed
    return used.nonzero()[:, 0].tolist(), others, counts, pair_scales, users, times


def saved_pairs(snapshot: Row, log: Iterable[Row]) -> SavedPairs:
    """From the columns (partition, meta_version, item_nos, others, counts, scales, users, taken) and `log_row`s."""
    partition, version, item_nos, *columns = snapshot
    events = [_events(partition, row) for row in log]
    if not item_nos:
        return SavedPairs(version, None, events)
    others, counts, scales, users, taken = (torch.from_numpy(np.frombuffer(column, kind).copy()) for column, kind in
                                            zip(columns, ("<i4", "<f4", "<f4", "<f4", "<i8"), strict=True))  # fmt: skip
    rows, num = torch.tensor(item_nos, dtype=torch.int64), len(item_nos)
    width = len(others) // num
    table = empty(max(item_nos) + 1, width)
    table.others[rows] = others.view(num, width).long()
    table.counts[rows] = counts.view(num, width, COUNTED)
    table.scale[rows], table.entered[rows] = scales.view(num, width, 2).unbind(2)
    table.users[rows] = users
    table.arrived[rows], table.latest[rows] = taken.view(num, 2).unbind(1)
    return SavedPairs(version, table, events)


def log_row(events: PairEvents) -> tuple[int, bytes, bytes]:
    """Columns first_offset, items, before."""
    return events.first_offset, events.items.astype("<i4").tobytes(), events.before.astype("<i4").tobytes()


def _events(partition: int, row: Row) -> PairEvents:
    first_offset, items, before = row
    numbers = np.frombuffer(items, "<i4").astype(np.int32)
    return PairEvents(
        partition, first_offset, numbers, np.frombuffer(before, "<i4").astype(np.int32).reshape(len(numbers), -1)
    )
