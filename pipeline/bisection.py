"""A batch that the database refuses is done again by halves, until the one record that it cannot hold is found.

Each half is a transaction of its own, and rows do not depend on how a log is cut: what is left out is that record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.batching import Parse
from pipeline.chunks import Chunk, count_records, cut
from pipeline.session import RowRefused
from schemas.events import Rejected

REASON = "CONSTRAINT"


def by_halves(
    step: Callable[[Sequence[Chunk], Parse[Any]], object],
    chunks: Sequence[Chunk],
    parse: Parse[Any],
    *,
    again: Callable[[], object],
    refused: Callable[[Rejected], object],
) -> None:
    """Do `step` on chunks, read by `parse`; a record that alone is refused is read as a rejection.

    `again` goes before each repetition, since a step that failed half-way may have moved things; `refused` is told of
    every record that is given up, and may stop it all by an exception.

    Raises:
        RowRefused: what is refused does not come from a record.

    """
    try:
        step(chunks, parse)
    except RowRefused as found:
        again()
        num_records = count_records(chunks)
        if num_records > 1:
            for half in cut(chunks, num_records // 2):
                by_halves(step, half, parse, again=again, refused=refused)
            return
        rejection = Rejected(REASON, str(found))
        refused(rejection)
        step(chunks, lambda *_: rejection)
