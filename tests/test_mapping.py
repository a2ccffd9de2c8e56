"""A foreign clickstream is read through a mapping file, and a wrong mapping file says what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import ConfigurationError, MappingInvalid
from schemas.events import Interaction, Rejected, parse_interaction
from schemas.mapping import Mapping, load_mapping, parse_mapping

RECORD_MS = 1_760_000_000_000
TEXT = """
event_time_unit = "s"
dismiss_below = 3

[fields]
event_id = "uuid"
user_id = "user.id"
item_id = "products.0.sku"
type = "event"
ts = "sent_at"
value = "properties.stars"

[types]
"Product Viewed" = "view"
"Product Rated" = "rating"
"""
FOREIGN: dict[str, Any] = {
    "uuid": "e1",
    "user": {"id": 42},
    "products": [{"sku": "i1"}, {"sku": "i2"}],
    "event": "Product Viewed",
    "sent_at": RECORD_MS / 1000 - 0.5,
    "properties": {"stars": None},
    "anything": "else",
}


@pytest.fixture
def mapping(tmp_path: Path) -> Mapping:
    path = tmp_path / "mapping.toml"
    path.write_text(TEXT, encoding="utf-8")
    return load_mapping(path)


def read(mapping: Mapping, **changes: Any) -> Interaction | Rejected:
    return parse_interaction(b"42", json.dumps(FOREIGN | changes).encode(), RECORD_MS, mapping=mapping)


def test_fields_are_found_where_the_mapping_says(mapping: Mapping) -> None:
    event = read(mapping)
    assert isinstance(event, Interaction)
    assert (event.event_id, event.user_id, event.item_id, event.type) == ("e1", "42", "i1", "view")
    assert (event.ts_ms, event.value, event.unknown_fields) == (RECORD_MS - 500, None, 0)


def test_a_mapped_event_equals_the_same_event_in_our_own_words(mapping: Mapping) -> None:
    ours = {"v": 1, "event_id": "e1", "user_id": "42", "item_id": "i1", "type": "view", "ts": RECORD_MS - 500}
    assert read(mapping) == parse_interaction(b"42", json.dumps(ours).encode(), RECORD_MS)


@pytest.mark.parametrize(
    ("stars", "expected"), [(1, "dismiss"), (2.9, "dismiss"), (3, "rating"), (5, "rating"), (None, "rating")]
)
def test_low_ratings_are_dismissals(mapping: Mapping, stars: float | None, expected: str) -> None:
    event = read(mapping, event="Product Rated", properties={"stars": stars})
    assert isinstance(event, Interaction)
    assert event.type == expected


def test_only_ratings_can_become_dismissals(mapping: Mapping) -> None:
    event = read(mapping, properties={"stars": 1})
    assert isinstance(event, Interaction)
    assert event.type == "view"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"uuid": None}, "BAD_TYPE"),
        ({"user": {}}, "MISSING_FIELD"),
        ({"user": "u"}, "MISSING_FIELD"),
        ({"user": {"id": "u2"}}, "KEY_MISMATCH"),
        ({"products": []}, "MISSING_FIELD"),
        ({"products": {"sku": "i1"}}, "MISSING_FIELD"),
        ({"event": "Page Viewed"}, "BAD_TYPE"),
        ({"event": 5}, "BAD_TYPE"),
        ({"event": "view"}, "BAD_TYPE"),
        ({"event": "Product Rated", "properties": {"stars": True}}, "BAD_TYPE"),
        ({"sent_at": True}, "BAD_TYPE"),
        ({"sent_at": 1e300}, "OUT_OF_RANGE"),
        ({"sent_at": 10**40}, "OUT_OF_RANGE"),
        ({"sent_at": RECORD_MS}, "TS_FUTURE"),
        ({"sent_at": "2025-10-09 08:53:20"}, "BAD_TYPE"),
    ],
)
def test_a_foreign_event_is_checked_by_the_same_rules(mapping: Mapping, changes: dict[str, Any], expected: str) -> None:
    rejected = read(mapping, **changes)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == expected


def test_a_missing_field_is_named_with_the_place_it_was_looked_for(mapping: Mapping) -> None:
    assert read(mapping, products=[]) == Rejected("MISSING_FIELD", "item_id is missing: nothing at products.0.sku")


def test_without_a_table_of_types_the_names_are_ours() -> None:
    names = {name: name for name in ("event_id", "user_id", "item_id", "type", "ts")}
    message = {"event_id": "e", "user_id": "42", "item_id": "i", "type": "cart", "ts": RECORD_MS}
    event = parse_interaction(b"42", json.dumps(message).encode(), RECORD_MS, mapping=parse_mapping({"fields": names}))
    assert isinstance(event, Interaction)
    assert event.type == "cart"


FIELDS = '[fields]\nevent_id="a"\nuser_id="b"\nitem_id="c"\ntype="d"\nts="e"\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[fields", "mapping"),
        ("", r"\[fields\] lacks event_id"),
        (FIELDS.replace('ts="e"\n', ""), r"\[fields\] lacks ts"),
        (FIELDS + 'colour="x"', "colour"),
        ('colour="x"\n' + FIELDS, "colour"),
        (FIELDS.replace('"a"', "5"), "event_id must be a dotted path"),
        (FIELDS.replace('"a"', '"a..b"'), "event_id must be a dotted path"),
        (FIELDS.replace('"a"', '""'), "event_id must be a dotted path"),
        ("fields = 5", "fields must be a table"),
        ('types = "x"\n' + FIELDS, "types must be a table"),
        (FIELDS + '[types]\nseen = "watch"', '"seen" must be one of impression'),
        (FIELDS + '[types]\nseen = ["view"]', '"seen" must be one of impression'),
        ('event_time_unit = "us"\n' + FIELDS, "event_time_unit must be one of ms, s"),
        ("event_time_unit = []\n" + FIELDS, "event_time_unit must be one of ms, s"),
        ('dismiss_below = "3"\n' + FIELDS, "dismiss_below must be a finite number"),
        ("dismiss_below = nan\n" + FIELDS, "dismiss_below must be a finite number"),
        ("dismiss_below = 3\n" + FIELDS, "dismiss_below needs"),
    ],
)
def test_a_wrong_mapping_names_the_entry(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "mapping.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MappingInvalid, match=named) as caught:
        load_mapping(path)
    assert str(path) in str(caught.value)


def test_a_mapping_that_is_not_there_or_not_text_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_mapping(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        load_mapping(tmp_path / "binary.toml")


foreign_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("Product Rated"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["id", "sku", "stars"]), inner, max_size=2)
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(list(FOREIGN)), foreign_values, max_size=3))
def test_any_foreign_json_ends_as_a_value_or_a_rejection(changes: dict[str, Any]) -> None:
    fields = {
        "event_id": "uuid", "user_id": "user.id", "item_id": "products.0.sku", "type": "event",
        "ts": "sent_at", "value": "properties.stars", "context": "properties",
    }  # fmt: skip
    content = {"fields": fields, "types": {"Product Rated": "rating"}, "event_time_unit": "s", "dismiss_below": 2}
    assert isinstance(read(parse_mapping(content), **changes), Interaction | Rejected)
