"""The checked-in JSON Schemas are what the code generates, and say what the decoder does."""

import json
from typing import Any

import jsonschema
import pytest

from schemas.event_types import CODES
from schemas.events import Interaction, parse_interaction
from schemas.json_schemas import FOLDER, TOPICS, as_text, json_schema, write_all

RECORD_MS = 1_760_000_000_000
ORDINARY = {"v": 1, "event_id": "e1", "user_id": "u1", "item_id": "i1", "type": "click", "ts": RECORD_MS}


@pytest.mark.parametrize("topic", TOPICS)
def test_the_checked_in_schema_is_not_stale(topic: str) -> None:
    checked_in = (FOLDER / f"{topic}.json").read_text(encoding="utf-8")
    assert checked_in == as_text(topic), "run python -m schemas.json_schemas"


def test_no_other_file_lies_beside_the_generated_ones(tmp_path: Any) -> None:
    assert {path.name for path in write_all(tmp_path)} == {path.name for path in FOLDER.glob("*.json")}


@pytest.mark.parametrize("topic", TOPICS)
def test_each_schema_is_a_valid_schema(topic: str) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema(topic))


def test_the_types_are_those_of_the_decoder() -> None:
    assert set(json_schema("interactions")["properties"]["type"]["enum"]) == set(CODES)


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"value": 4.5, "context": {"a": [1]}}, True),
        ({"value": None, "context": None}, True),
        ({"event_id": 7}, True),
        ({"ts": "2025-10-09T08:53:20+00:00"}, True),
        ({"extra": 1}, True),
        ({"v": 2}, False),
        ({"type": "teleport"}, False),
        ({"item_id": ""}, False),
        ({"item_id": "a\nb"}, False),
        ({"item_id": "i" * 129}, False),
        ({"item_id": 2**63}, False),
        ({"item_id": None}, False),
        ({"ts": "2025-10-09T08:53:20"}, False),
        ({"ts": 0}, False),
        ({"ts": 1.5}, False),
        ({"value": "5"}, False),
        ({"context": []}, False),
    ],
)
def test_schema_and_decoder_agree(changes: dict[str, Any], valid: bool) -> None:
    message = ORDINARY | changes
    validator = jsonschema.Draft202012Validator(json_schema("interactions"))
    assert validator.is_valid(message) is valid
    event = parse_interaction(b"u1", json.dumps(message).encode(), RECORD_MS)
    assert isinstance(event, Interaction) is valid


@pytest.mark.parametrize("name", ["v", "event_id", "user_id", "item_id", "type", "ts"])
def test_schema_and_decoder_require_the_same_fields(name: str) -> None:
    message = {key: value for key, value in ORDINARY.items() if key != name}
    assert not jsonschema.Draft202012Validator(json_schema("interactions")).is_valid(message)
    assert not isinstance(parse_interaction(b"u1", json.dumps(message).encode(), RECORD_MS), Interaction)
