"""Synthetic streams as files to feed: the same plan gives the same bytes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from pipeline.synthetic import Plan, catalogue, draw_events
from pipeline.synthetic_messages import messages


def write_synthetic(plan: Plan, out: Path, *, duplicates: float = 0.0, malformed: float = 0.0) -> tuple[Path, Path]:
    """Write `interactions.jsonl.gz` and `items.jsonl` into a folder; returns their paths.

    `duplicates` and `malformed` are expected numbers per event, as in `pipeline.synthetic_messages.messages`.
    """
    out.mkdir(parents=True, exist_ok=True)
    interactions, items = out / "interactions.jsonl.gz", out / "items.jsonl"
    stream = messages(draw_events(plan), duplicates=duplicates, malformed=malformed, seed=plan.seed)
    # Neither a name nor a time in the gzip header: they would change the bytes.
    with interactions.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0, compresslevel=6) as file:
        file.writelines(message.value + b"\n" for message in stream)
    with items.open("wb") as file:
        file.writelines(json.dumps(item, separators=(",", ":")).encode() + b"\n" for item in catalogue(plan))
    return interactions, items
