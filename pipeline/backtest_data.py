"""What a backtest runs on: a file of interactions, or a data set by name, as a log with item texts."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.adaptation import Types
from pipeline.datasets import LATER_SECONDS, MovieLens100K, load_ml100k
from pipeline.foreign_columns import GuessedColumns, guess_columns
from pipeline.interaction_log import InteractionLog, collect
from pipeline.lines import Line, open_source
from pipeline.produce import interaction_record
from pipeline.stages import Stages
from pipeline.synthetic import Plan
from pipeline.synthetic_files import write_synthetic
from pipeline.training_data import NothingToLearn, texts_of_file
from schemas.events import Interaction, Rejected, parse_interaction
from schemas.mapping import Mapping, load_mapping
from schemas.wire import Refusal, json_object


@dataclass
class Source:
    """Where interactions and texts come from, and what has to be said about them."""

    name: str
    mapping: Mapping | None
    items: str | None
    notes: list[str] = field(default_factory=list)
    columns: tuple[str, ...] = ()


def load_log(
    data: str, *, items: str | None, mapping: Path | None, most_users: int, types: Types, home: Path, progress: Stages
) -> tuple[InteractionLog, list[str]]:
    """Read a file or a named data set; also what the reader of a report has to know about the reading.

    Raises ConfigurationError for what has to be corrected: the file, or the option that the message names.
    """
    source = Source(data, load_mapping(mapping) if mapping else None, items)
    events: Iterator[Interaction | Rejected]
    if data == "ml-100k" and not Path(data).exists():
        films = load_ml100k(home)
        events = _rated(films)
        texts = {film.item_id: film.text for film in films.films}
    elif data == "synthetic" and not Path(data).exists():
        with tempfile.TemporaryDirectory() as folder:
            interactions, catalogue = write_synthetic(Plan(), Path(folder))
            events = iter(list(_read(str(interactions), source)))
            texts = texts_of_file(str(catalogue))
    else:
        events = _read(data, source)
        texts = texts_of_file(items) if items else {}
    collector = collect(events, most_users=most_users, progress=lambda done: progress("read events", done, None))
    log = collector.log(texts, (types.positive, types.weight))
    progress("read events", len(log.users), len(log.users))
    if not log.positive.any():
        raise NothingToLearn(f"{data}: {_nothing_in(source, collector.rejected)}")
    return log, source.notes + _notes(log, most_users)


def _nothing_in(source: Source, rejected: Counter[str]) -> str:
    """Why a file has no positive event, and what mends it."""
    if not rejected:
        return "no events: the file is empty, or none of its events is of a type that counts as positive"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common(3))
    columns = f"; its fields are {', '.join(source.columns)}" if source.columns else ""
    mends = "--mapping FILE.toml says which fields are user, item, type and time"
    return f"no positive event (rejected: {reasons}){columns}; {mends}"


def _rated(films: MovieLens100K) -> Iterator[Interaction]:
    """The ratings in file order, 25 years later."""
    columns = (films.users, films.items, films.seconds)
    for row, (user, item, seconds) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        ts_ms = (seconds + LATER_SECONDS) * 1000
        yield Interaction(f"ml-{row}", str(user), str(item), "rating", ts_ms, None, 0, row, 0)


def _read(path: str, source: Source) -> Iterator[Interaction | Rejected]:
    with open_source(path) as lines:
        rest = iter(lines)
        first = list(islice(rest, 1))
        row = _row(first[0]) if first else {}
        source.columns = tuple(row)[:20]
        if first and source.mapping is None:
            guessed = guess_columns(row)
            if guessed is not None and guessed.as_text():
                source.mapping = guessed
                source.notes.append(f"No --mapping was given: {guessed.as_text()}.")
        later_ms = source.mapping.later_ms if isinstance(source.mapping, GuessedColumns) else 0
        now_ms = int(time.time() * 1000) + later_ms
        for line in chain(first, rest):
            record = interaction_record(line, mapping=source.mapping, now_ms=now_ms)
            if isinstance(record, Rejected):
                yield record
            else:
                # Checked against its own time: a file of the past has no Kafka timestamp.
                yield parse_interaction(record.key, record.value, record.ts_ms or 0)


def _row(line: Line) -> dict[str, Any]:
    if not isinstance(line.content, bytes):
        return dict(line.content or {})
    try:
        return json_object(line.content)
    except Refusal:
        return {}


def _notes(log: InteractionLog, most_users: int) -> list[str]:
    notes = []
    if log.share_of_users < 1:
        notes.append(
            f"The file has more than {most_users:,} users: {len(log.user_ids):,} of them were kept, "
            f"by a hash of the id, with all their events (--max-users)."
        )
    if log.rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in log.rejected.most_common(5))
        notes.append(f"Lines that no worker would apply were left out: {reasons}.")
    without = sum(text is None for text in log.texts)
    if without:
        notes.append(f"{without:,} of {len(log.item_ids):,} items have no text (--items names the catalogue).")
    return notes
