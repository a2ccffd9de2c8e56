"""The decoder: every record ends as a value or as a rejection with the reason that FAULTS and the contract name."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas import events
from schemas.event_types import CODES
from schemas.events import (
    REASONS,
    CatalogueItem,
    Erasure,
    Interaction,
    Rejected,
    Withdrawal,
    escaped,
    parse_erasure,
    parse_interaction,
    parse_item,
)
from schemas.wire import Refusal

RECORD_MS = 1_760_000_000_000  # 2025-10-09T08:53:20Z
ORDINARY: dict[str, Any] = {
    "v": 1,
    "event_id": "e1",
    "user_id": "u1",
    "item_id": "i1",
    "type": "click",
    "ts": RECORD_MS,
}


def message(**changes: Any) -> bytes:
    return json.dumps(ORDINARY | changes, ensure_ascii=False).encode()


def with_raw(name: str, raw: bytes) -> bytes:
    """An ordinary event with one field's JSON text replaced (added when it is new)."""
    marked = json.dumps(ORDINARY | {name: "@@@"}).encode()
    return marked.replace(b'"@@@"', raw)


def without(name: str) -> bytes:
    return json.dumps({key: value for key, value in ORDINARY.items() if key != name}).encode()


def read(value: bytes | None, key: bytes | None = b"u1", record_ms: int = RECORD_MS) -> Interaction | Rejected:
    return parse_interaction(key, value, record_ms)


def accepted(value: bytes, key: bytes = b"u1", record_ms: int = RECORD_MS) -> Interaction:
    event = read(value, key, record_ms)
    assert isinstance(event, Interaction), event
    return event


def reason(value: bytes | None, key: bytes | None = b"u1", record_ms: int = RECORD_MS) -> str:
    rejected = read(value, key, record_ms)
    assert isinstance(rejected, Rejected), rejected
    assert rejected.reason in REASONS
    return rejected.reason


def test_an_ordinary_event_is_read_field_by_field() -> None:
    event = accepted(message(type="rating", value=4.5, context={"page": "home"}))
    assert (event.event_id, event.user_id, event.item_id, event.type) == ("e1", "u1", "i1", "rating")
    assert (event.ts_ms, event.value, event.unknown_fields) == (RECORD_MS, 4.5, 0)


@pytest.mark.parametrize(
    ("context", "scene"),
    [({"scene": "home"}, "home"), ({"scene": 7}, None), ({"scene": "a\nb"}, None), ({"scene": ""}, None), ({}, None),
     ({"scene": "deep", "more": {"a": [1]}}, "deep")],
)  # fmt: skip
def test_a_scene_is_read_where_the_context_has_one_and_is_never_a_fault(context: Any, scene: str | None) -> None:
    assert accepted(message(context=context)).scene == scene


@pytest.mark.parametrize("name", CODES)
def test_every_type_of_the_contract_is_read(name: str) -> None:
    assert accepted(message(type=name)).type == name


MALFORMED = {
    "bad UTF-8 in an id": (with_raw("item_id", b'"\xff"'), "BAD_ENCODING"),
    "a UTF-8 surrogate": (with_raw("item_id", b'"\xed\xa0\x80"'), "BAD_ENCODING"),
    "UTF-16": (message().decode().encode("utf-16"), "BAD_ENCODING"),
    "bad UTF-8 in an ignored field": (with_raw("extra", b'"\xff"'), "BAD_ENCODING"),
    "bad UTF-8 in the context": (with_raw("context", b'{"a":"\xff"}'), "BAD_ENCODING"),
    "truncated": (message()[:-3], "BAD_JSON"),
    "nothing": (b"", "BAD_JSON"),
    "no value": (None, "BAD_JSON"),
    "only spaces": (b"  \n", "BAD_JSON"),
    "two objects": (message() + message(), "BAD_JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + message(), "BAD_JSON"),
    "a raw newline in a string": (with_raw("item_id", b'"a\nb"'), "BAD_JSON"),
    "a leading zero": (with_raw("ts", b"01760000000000"), "BAD_JSON"),
    "an array": (b"[]", "NOT_OBJECT"),
    "null": (b"null", "NOT_OBJECT"),
    "a string": (b'"x"', "NOT_OBJECT"),
    "a number": (b"7", "NOT_OBJECT"),
    "a version as text": (message(v="1"), "BAD_TYPE"),
    "a version as a float": (message(v=1.0), "BAD_TYPE"),
    "a version as a boolean": (message(v=True), "BAD_TYPE"),
    "a boolean id": (message(item_id=True), "BAD_TYPE"),
    "a float id": (message(item_id=5.0), "BAD_TYPE"),
    "a null id": (message(item_id=None), "BAD_TYPE"),
    "an array as an id": (message(item_id=["i"]), "BAD_TYPE"),
    "a number as the type": (message(type=2), "BAD_TYPE"),
    "a type that nobody knows": (message(type="teleport"), "BAD_TYPE"),
    "a value as text": (message(value="5"), "BAD_TYPE"),
    "a boolean value": (message(value=True), "BAD_TYPE"),
    "a context that is an array": (message(context=[]), "BAD_TYPE"),
    "a time without an offset": (message(ts="2025-10-09T08:53:20"), "BAD_TYPE"),
    "a date alone": (message(ts="2025-10-09"), "BAD_TYPE"),
    "a time as digits in text": (message(ts=str(RECORD_MS)), "BAD_TYPE"),
    "a float time": (message(ts=RECORD_MS + 0.5), "BAD_TYPE"),
    "a boolean time": (message(ts=True), "BAD_TYPE"),
    "a day that does not exist": (message(ts="2025-02-30T00:00:00Z"), "BAD_TYPE"),
    "NaN": (with_raw("value", b"NaN"), "NON_FINITE"),
    "Infinity": (with_raw("value", b"-Infinity"), "NON_FINITE"),
    "beyond a double": (with_raw("value", b"1e999"), "NON_FINITE"),
    "beyond a double in the context": (with_raw("context", b'{"a":1e999}'), "NON_FINITE"),
    "NaN in an ignored field": (with_raw("extra", b"NaN"), "NON_FINITE"),
    "version 2": (message(v=2), "UNKNOWN_VERSION"),
    "version 0": (message(v=0), "UNKNOWN_VERSION"),
    "NUL in an id": (message(item_id="a\0b"), "BAD_ID"),
    "a lone surrogate in an id": (with_raw("item_id", rb'"\ud800"'), "BAD_ID"),
    "a newline in an id": (message(event_id="a\nb"), "BAD_ID"),
    "an escape sequence in an id": (message(item_id="\x1b[2J"), "BAD_ID"),
    "a C1 control in an id": (message(item_id="a\x9bb"), "BAD_ID"),
    "DEL in an id": (message(item_id="a\x7f"), "BAD_ID"),
    "an empty id": (message(item_id=""), "BAD_ID"),
    "129 bytes": (message(item_id="i" * 129), "BAD_ID"),
    "129 bytes in 43 characters": (message(item_id="€" * 43), "BAD_ID"),
    "an id beyond int64": (message(item_id=2**63), "OUT_OF_RANGE"),
    "an id below int64": (message(item_id=-(2**63) - 1), "OUT_OF_RANGE"),
    "an id of 5,000 digits": (with_raw("item_id", b"9" * 5000), "OUT_OF_RANGE"),
    "a time beyond int64": (message(ts=2**63), "OUT_OF_RANGE"),
    "a time of 5,000 digits": (with_raw("ts", b"9" * 5000), "OUT_OF_RANGE"),
    "a value beyond int64": (message(value=10**30), "OUT_OF_RANGE"),
    "six minutes ahead": (message(ts=RECORD_MS + 360_000), "TS_FUTURE"),
    "microseconds": (message(ts=RECORD_MS * 1000), "TS_FUTURE"),
    "1970": (message(ts=0), "TS_ANCIENT"),
    "seconds": (message(ts=RECORD_MS // 1000), "TS_ANCIENT"),
    "before 2000": (message(ts="1999-12-31T23:59:59.999Z"), "TS_ANCIENT"),
    "the year 1": (message(ts="0001-01-01T00:00:00+23:59"), "TS_ANCIENT"),
    "5 MiB": (message(context={"a": "x" * 5 * 2**20}), "TOO_LARGE"),
    "100,000 levels": (with_raw("context", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "TOO_DEEP"),
    "levels beyond the limit of size": (message(context={"a": "x" * 70_000, "b": [[[[[[[[[]]]]]]]]]}), "TOO_LARGE"),
    "9 levels": (with_raw("context", b"{" + b'"a":{' * 7 + b"}" * 8), "TOO_DEEP"),
    "9 levels that a later key hides": (with_raw("context", b'{"a":' + b"[" * 7 + b"]" * 7 + b',"a":1}'), "TOO_DEEP"),
}


@pytest.mark.parametrize(("value", "expected"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_record_is_rejected_by_its_own_reason(value: bytes | None, expected: str) -> None:
    assert reason(value) == expected


@pytest.mark.parametrize("name", ["v", "event_id", "user_id", "item_id", "type", "ts"])
def test_a_missing_field_is_named(name: str) -> None:
    assert read(without(name)) == Rejected("MISSING_FIELD", f"{name} is missing")


@pytest.mark.parametrize("key", [None, b"", b"u2", b"U1", b"u1 ", b"\xff"])
def test_a_key_that_is_not_the_user_is_refused(key: bytes | None) -> None:
    assert reason(message(), key) == "KEY_MISMATCH"


def test_the_reasons_that_tests_expect_are_all_the_decoder_has() -> None:
    found = {expected for _, expected in MALFORMED.values()} | {"MISSING_FIELD", "KEY_MISMATCH"}
    assert found | {"CONFLICTING_DUPLICATE", "CONSTRAINT"} == set(REASONS)


def test_the_last_of_two_equal_keys_wins() -> None:
    assert accepted(message()[:-1] + b',"item_id":"i2"}').item_id == "i2"
    assert accepted(message(extra=1)[:-1] + b',"item_id":"i2"}').item_id == "i2"


def test_unknown_fields_are_accepted_and_counted() -> None:
    assert accepted(message(extra=1, another={"a": [1, {}]})).unknown_fields == 2


def test_integer_ids_become_their_decimal_strings() -> None:
    event = accepted(message(event_id=-5, user_id=42, item_id=2**63 - 1), b"42")
    assert (event.event_id, event.user_id, event.item_id) == ("-5", "42", "9223372036854775807")
    assert event == accepted(message(event_id="-5", user_id="42", item_id="9223372036854775807"), b"42")


@pytest.mark.parametrize("item_id", ["'; DROP TABLE items; --", "../../etc/passwd", "%s", "i 1", "é€😀", "i" * 128])
def test_an_odd_id_is_kept_letter_by_letter(item_id: str) -> None:
    assert accepted(message(item_id=item_id)).item_id == item_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025-10-09T08:53:20Z", RECORD_MS),
        ("2025-10-09t08:53:20z", RECORD_MS),
        ("2025-10-09 10:53:20+02:00", RECORD_MS),
        ("2025-10-09T08:53:19.9994Z", RECORD_MS - 1),
        ("2016-12-31T23:59:60Z", 1_483_228_800_000),
    ],
)
def test_rfc_3339_times_become_epoch_milliseconds(text: str, expected: int) -> None:
    assert accepted(message(ts=text)).ts_ms == expected


def test_five_minutes_ahead_and_the_first_moment_of_2000_are_the_limits() -> None:
    assert accepted(message(ts=RECORD_MS + 300_000)).ts_ms == RECORD_MS + 300_000
    assert reason(message(ts=RECORD_MS + 300_001)) == "TS_FUTURE"
    assert accepted(message(ts=946_684_800_000)).ts_ms == 946_684_800_000
    assert reason(message(ts=946_684_799_999)) == "TS_ANCIENT"


def test_a_record_without_a_kafka_timestamp_still_has_its_unit_checked() -> None:
    assert accepted(message(), record_ms=-1).ts_ms == RECORD_MS
    assert reason(message(ts=RECORD_MS * 1000), record_ms=-1) == "TS_FUTURE"


def test_64_kib_and_8_levels_are_the_limits() -> None:
    room = 64 * 1024 - len(message(context={"a": ""}))
    assert isinstance(read(message(context={"a": "x" * room})), Interaction)
    assert reason(message(context={"a": "x" * (room + 1)})) == "TOO_LARGE"
    assert isinstance(read(with_raw("context", b"{" + b'"a":{' * 6 + b"}" * 7)), Interaction)


def test_brackets_inside_strings_do_not_nest() -> None:
    assert isinstance(read(message(context={"a": '[[[[[[[[[[[[ \\" {{{{'})), Interaction)
    assert reason(b'{"a":"' + b"[" * 50) == "BAD_JSON"


@pytest.mark.timeout(20)  # milliseconds; a pattern that can fail at a quote takes 50 s
def test_quotes_that_never_end_are_read_in_linear_time() -> None:
    assert reason(b'{"[[[[[[[[":' + b'"\\' * 32_000) == "BAD_JSON"


def test_the_body_hash_follows_the_meaning_and_not_the_spelling() -> None:
    plain = accepted(message(value=4, context={"a": 1, "b": "x"}))
    reordered: dict[str, Any] = {"context": {"b": "x", "a": 1}, "value": 4.0}
    spelled = json.dumps(reordered | ORDINARY, indent=3).encode()
    assert accepted(spelled) == plain
    assert accepted(message(value=4, context={"a": 1, "b": "x"}, extra=1)).body_hash == plain.body_hash
    assert accepted(message(value=-0.0)).body_hash == accepted(message(value=0)).body_hash
    changed: list[dict[str, Any]] = [
        {"item_id": "i2"},
        {"type": "view"},
        {"ts": RECORD_MS - 1},
        {"value": 5},
        {"context": {"a": 2}},
    ]
    hashes = {accepted(message(**{"value": 4, **change})).body_hash for change in changed}
    assert len(hashes | {plain.body_hash}) == 6


def test_the_hashes_are_stored_and_so_may_never_change() -> None:
    event = accepted(message(value=4.5, context={"a": 1}))
    assert (event.id_hash, event.body_hash) == (292540415853092123, -343582453)
    assert -(2**63) <= event.id_hash < 2**63
    assert -(2**31) <= event.body_hash < 2**31
    assert accepted(message(event_id="e2")).id_hash != event.id_hash
    assert accepted(message(event_id="e2", value=4.5, context={"a": 1})).body_hash == event.body_hash


def test_a_rejection_quotes_nothing_of_the_payload() -> None:
    for value, _ in MALFORMED.values():
        rejected = read(value)
        assert isinstance(rejected, Rejected)
        assert len(rejected.detail) <= 500
        assert rejected.detail.isascii()
        assert rejected.detail.isprintable()
    secret = read(message(type="hunter2", item_id="hunter2", hunter2=1))
    assert isinstance(secret, Rejected)
    assert "hunter2" not in secret.detail


def test_escaping_leaves_nothing_that_moves_a_terminal() -> None:
    assert escaped("a\nb\x1b[2J\r\x9b€") == r"a\nb\x1b[2J\r\x9b\u20ac"
    assert escaped("x" * 600) == "x" * 500
    long = escaped("\0" * 400)
    assert len(long) == 500
    assert long.endswith("...")


# --- any bytes at all ---------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["u1", "click", "teleport", RECORD_MS, "2025-10-09T08:53:20.9999Z", "2025-10-09T08:53:20", 2**63, 1e22, -0.0]
    )
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
field_names = st.sampled_from([*ORDINARY, "value", "context", "extra"])


@st.composite
def nearly_ordinary(draw: st.DrawFn) -> bytes:
    """An event of which some fields are replaced, dropped or doubled, and some bytes turned."""
    fields = list((ORDINARY | draw(st.dictionaries(field_names, anything, max_size=3))).items())
    fields += draw(st.lists(st.tuples(field_names, scalars), max_size=1))
    dropped = draw(st.sets(field_names, max_size=1)) if draw(st.booleans()) else set()
    parts = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in fields if name not in dropped]
    value = bytearray(("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass"))
    if draw(st.integers(0, 3)) == 0:
        value[draw(st.integers(0, len(value) - 1))] = draw(st.integers(0, 255))
    return bytes(value)


keys = st.sampled_from([b"u1", b"", None, b"u2", b"0"])
record_times = st.sampled_from([RECORD_MS, -1, 0])


@settings(max_examples=500, deadline=None)
@given(keys, st.binary(max_size=64) | nearly_ordinary(), record_times)
def test_any_bytes_end_as_a_value_or_a_rejection(key: bytes | None, value: bytes, record_ms: int) -> None:
    outcome = parse_interaction(key, value, record_ms)
    if isinstance(outcome, Rejected):
        assert outcome.reason in REASONS
        assert len(outcome.detail) <= 500
        assert outcome.detail.isprintable()
    else:
        assert outcome.type in CODES
        assert key == outcome.user_id.encode()
    assert isinstance(parse_item(key, value), CatalogueItem | Withdrawal | Rejected)
    assert isinstance(parse_erasure(key, value, record_ms), Erasure | Rejected)


@settings(max_examples=1000, deadline=None)
@given(nearly_ordinary(), record_times)
@example(message(context={"a": 10**30}), RECORD_MS)
@example(message(context={"a": -(10**30)}), RECORD_MS)
@example(message(context={"a": [10**30]}), RECORD_MS)
@example(message(context={"a": {"b": 10**30}}), RECORD_MS)
def test_what_the_fast_reading_accepts_the_careful_one_reads_the_same(value: bytes, record_ms: int) -> None:
    fast = events._parse_ordinary(b"u1", value, record_ms)
    try:
        careful = events._parse_carefully(b"u1", value, record_ms, None)
    except Refusal:
        assert fast is None
    else:
        assert fast in (None, careful)


@pytest.mark.parametrize(
    "changes", [{}, {"value": 4}, {"context": {"a": 1, "b": None}}, {"ts": "2025-10-09T08:53:20Z"}, {"item_id": 7}]
)
def test_ordinary_events_take_the_fast_reading(changes: dict[str, Any]) -> None:
    assert events._parse_ordinary(b"u1", message(**changes), RECORD_MS) is not None


# --- the other topics ---------------------------------------------------------------------------------------------

ITEM: dict[str, Any] = {"v": 1, "item_id": "i1", "text": "Toy Story (1995)"}


def item(**changes: Any) -> bytes:
    return json.dumps(ITEM | changes).encode()


def test_a_catalogue_item_is_read_field_by_field() -> None:
    assert parse_item(b"i1", item()) == CatalogueItem("i1", "Toy Story (1995)", None, True)
    full = item(attributes={"genres": ["Comedy"]}, available=False, extra=1)
    assert parse_item(b"i1", full) == CatalogueItem("i1", "Toy Story (1995)", {"genres": ["Comedy"]}, False)


def test_a_record_without_a_value_withdraws_the_item_of_its_key() -> None:
    assert parse_item(b"i1", None) == Withdrawal("i1")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (None, None, "KEY_MISMATCH"),
        (b"\xff", None, "BAD_ENCODING"),
        (b"", None, "BAD_ID"),
        (b"a\nb", None, "BAD_ID"),
        (b"i2", item(), "KEY_MISMATCH"),
        (b"i1", item(text=None), "BAD_TYPE"),
        (b"i1", item(text="a\0"), "BAD_ENCODING"),
        (b"i1", item(attributes={"a": ["\ud800"]}), "BAD_ENCODING"),
        (b"i1", item(attributes={"a\0": 1}), "BAD_ENCODING"),
        (b"i1", item(attributes=[]), "BAD_TYPE"),
        (b"i1", item(available="no"), "BAD_TYPE"),
        (b"i1", item(v=2), "UNKNOWN_VERSION"),
        (b"i1", b'{"v":1,"item_id":"i1"}', "MISSING_FIELD"),
        (b"i1", b"[]", "NOT_OBJECT"),
    ],
)
def test_a_malformed_item_is_rejected_by_its_own_reason(key: bytes | None, value: bytes | None, expected: str) -> None:
    rejected = parse_item(key, value)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == expected


def test_an_erasure_is_read_and_checked_like_an_event() -> None:
    value = msgspec.json.encode({"v": 1, "user_id": "u1", "requested_at": "2025-10-09T08:53:20Z"})
    assert parse_erasure(b"u1", value, RECORD_MS) == Erasure("u1", RECORD_MS)
    assert parse_erasure(b"u2", value, RECORD_MS) == Rejected("KEY_MISMATCH", "the record's key is not its user_id")
