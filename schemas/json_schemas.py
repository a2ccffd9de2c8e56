"""JSON Schemas of the three topics' values, generated from the types below: `python -m schemas.json_schemas`.

They are for producers and for other languages. The decoder in events.py is the law and knows more than a schema can
say: bytes instead of characters, the record's key and its Kafka timestamp, depth and size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from schemas.event_types import NAMES
from schemas.fields import EARLIEST_MS, MAX_ID_BYTES
from schemas.wire import INT64_MAX, INT64_MIN

FOLDER = Path(__file__).parent / "json"

Id = (
    Annotated[
        str,
        Meta(
            min_length=1,
            max_length=MAX_ID_BYTES,
            pattern="^[^\\u0000-\\u001f\\u007f-\\u009f]*$",
            description=f"1 to {MAX_ID_BYTES} bytes of UTF-8 without control characters",
        ),
    ]
    | Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX, description="becomes its decimal string")]
)
Time = (
    Annotated[
        str,
        Meta(
            pattern=r"^\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}([.]\d+)?([Zz]|[+-]\d{2}:?\d{2})$",
            description="RFC 3339, with an offset",
            extra_json_schema={"format": "date-time"},
        ),
    ]
    | Annotated[int, Meta(ge=EARLIEST_MS, le=INT64_MAX, description="milliseconds since 1970-01-01T00:00:00Z")]
)
TypeName = Literal[NAMES]  # type: ignore[valid-type]  # the names of event_types.py, not repeated here
Version = Literal[1]


class Interaction(msgspec.Struct):
    """A user did something with an item. Record key: user_id. Unknown fields are ignored."""

    v: Version
    event_id: Annotated[Id, Meta(description="the same in every retry; remembered per user")]
    user_id: Id
    item_id: Id
    type: TypeName
    ts: Annotated[Time, Meta(description="when it happened; not more than 5 minutes ahead of the record's timestamp")]
    value: Annotated[float | None, Meta(description="a rating or an amount, finite")] = None
    context: Annotated[dict[str, Any] | None, Meta(description="anything; nested at most 7 levels")] = None


class CatalogueItem(msgspec.Struct):
    """What is known of an item. Record key: item_id; a record without a value withdraws the item."""

    v: Version
    item_id: Id
    text: Annotated[str, Meta(description="title, description, …: what the text encoder reads")]
    attributes: dict[str, Any] | None = None
    available: bool | None = True


class Erasure(msgspec.Struct):
    """A user wants to be forgotten. Record key: user_id."""

    v: Version
    user_id: Id
    requested_at: Time


TOPICS: dict[str, type[msgspec.Struct]] = {
    "interactions": Interaction,
    "items": CatalogueItem,
    "erasures": Erasure,
}


def json_schema(topic: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one topic's values."""
    schema = msgspec.json.schema(TOPICS[topic])
    (definition,) = schema["$defs"].values()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **definition}


def as_text(topic: str) -> str:
    """Return the schema as the checked-in file holds it."""
    return json.dumps(json_schema(topic), indent=2, ensure_ascii=False) + "\n"


def write_all(folder: Path = FOLDER) -> list[Path]:
    """Write all schemas, and return where they are."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{topic}.json" for topic in TOPICS]
    for path in paths:
        path.write_text(as_text(path.stem), encoding="utf-8")
    return paths


if __name__ == "__main__":
    for written in write_all():
        print(written)
