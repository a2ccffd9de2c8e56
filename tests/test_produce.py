"""Feeding: what becomes of a line, at which pace, and that a bad line costs only itself."""

import gzip
import json
from pathlib import Path

import pytest
from kafka.partitioner import murmur2

from pipeline import topics
from pipeline.catalogue_feed import item_record
from pipeline.feeding import feed
from pipeline.lines import InputUnreadable, Line, open_source
from pipeline.produce import Outgoing, Pace, interaction_record, produce, raw_record
from schemas.errors import ConfigurationError
from schemas.events import CatalogueItem, Interaction, Rejected, parse_interaction, parse_item
from schemas.mapping import parse_mapping
from tests.brokers import Tansu

EVENT = {"v": 1, "event_id": "e1", "user_id": "u1", "item_id": "i1", "type": "click", "ts": 1_700_000_000_000}
NOW_MS = 1_800_000_000_000


def line(content: object, number: int = 1) -> Line:
    return Line(number, content if isinstance(content, bytes) else json.dumps(content).encode())


def without(*names: str) -> dict[str, object]:
    return {name: value for name, value in EVENT.items() if name not in names}


def sent(found: Outgoing | Rejected) -> Outgoing:
    assert isinstance(found, Outgoing)
    return found


def rows_of(path: Path) -> list[Line]:
    with open_source(str(path)) as source:
        return list(source)


class Collected:
    """An outlet that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bytes | None, bytes | None]] = []

    def send(self, number: int, key: bytes | None, value: bytes | None) -> None:
        self.records.append((number, key, value))


def test_a_complete_line_is_sent_byte_by_byte_and_keyed_by_its_user() -> None:
    raw = b'{"v": 1,  "event_id":"e1","user_id":7,"item_id":"i1","type":"click","ts":1700000000000, "extra": []}'
    assert interaction_record(Line(1, raw)) == Outgoing(b"7", raw, 1_700_000_000_000)


def test_an_id_is_made_from_content_and_number_so_that_feeding_twice_applies_once() -> None:
    first, again, elsewhere = (sent(interaction_record(line(without("event_id"), at))) for at in (1, 1, 2))
    assert first == again
    assert json.loads(first.value or b"")["event_id"] != json.loads(elsewhere.value or b"")["event_id"]


def test_what_is_sent_is_what_the_worker_accepts() -> None:
    record = sent(interaction_record(line(without("event_id", "v"))))
    parsed = parse_interaction(record.key, record.value, NOW_MS)
    assert isinstance(parsed, Interaction)
    assert (parsed.user_id, parsed.item_id, parsed.ts_ms) == ("u1", "i1", 1_700_000_000_000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "BAD_JSON"),
        (b"[1]", "NOT_OBJECT"),
        (b'{"user_id": "\xff"}', "BAD_ENCODING"),
        (without("item_id"), "MISSING_FIELD"),
        (without("user_id"), "MISSING_FIELD"),
        ({**EVENT, "user_id": True}, "BAD_TYPE"),
        ({**EVENT, "user_id": "a\nb"}, "BAD_ID"),
        ({**EVENT, "user_id": "\ud800"}, "BAD_ID"),
        ({**EVENT, "type": "clik"}, "BAD_TYPE"),
        ({**EVENT, "ts": 4_000_000_000_000}, "TS_FUTURE"),
        ({**EVENT, "ts": 1_700_000_000}, "TS_ANCIENT"),
    ],
)
def test_a_line_that_no_worker_could_apply_is_rejected_with_the_workers_reason(content: object, reason: str) -> None:
    found = interaction_record(line(content), now_ms=NOW_MS)
    assert isinstance(found, Rejected)
    assert found.reason == reason


def test_bad_lines_are_named_by_number_and_the_rest_is_sent() -> None:
    outlet, named = Collected(), list[tuple[int, str]]()
    content = [line(EVENT, 1), Line(2, b"{"), line({**EVENT, "ts": "x"}, 3), line({**EVENT, "event_id": "e2"}, 4)]
    tally = produce(
        content, outlet, interaction_record, pace=Pace(), complain=lambda at, why: named.append((at, why.reason))
    )
    assert [number for number, _, _ in outlet.records] == [1, 4]
    assert named == [(2, "BAD_JSON"), (3, "BAD_TYPE")]
    assert (tally.sent, tally.malformed, dict(tally.reasons)) == (2, 2, {"BAD_JSON": 1, "BAD_TYPE": 1})


def test_a_line_may_be_passed_through_whatever_it_is() -> None:
    assert raw_record(Line(1, b"\x00{nonsense")) == Outgoing(None, b"\x00{nonsense", None)
    assert raw_record(line({"user_id": "u9"})) == Outgoing(b"u9", b'{"user_id": "u9"}', None)


MAPPING = parse_mapping(
    {
        "event_time_unit": "s",
        "fields": {"event_id": "line_id", "user_id": "who.id", "item_id": "what", "type": "did", "ts": "at"},
        "types": {"Bought": "purchase"},
    }
)


def test_a_mapped_line_is_sent_in_the_contracts_form_keyed_by_its_user() -> None:
    foreign = {"who": {"id": 5}, "what": "shoe", "did": "Bought", "at": 1_700_000_000}
    record = sent(interaction_record(line(foreign), mapping=MAPPING))
    assert record.key == b"5"
    message = json.loads(record.value or b"")
    assert len(message.pop("event_id")) == 32
    assert message == {"v": 1, "user_id": 5, "item_id": "shoe", "type": "purchase", "ts": 1_700_000_000_000}


def test_a_mapped_line_without_a_field_is_rejected() -> None:
    found = interaction_record(line({"what": "shoe"}), mapping=MAPPING)
    assert isinstance(found, Rejected)
    assert found.reason == "MISSING_FIELD"


def test_a_csv_row_gives_the_same_event_as_its_json(tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    file.write_text(
        "event_id,user_id,item_id,type,ts,value\n"
        'e1,u1,"i,1",rating,1700000000000,4.5\n'
        "e2,u1,i2,click,2023-11-14T22:13:20Z,\n",
    )
    first, second = (json.loads(sent(interaction_record(row)).value or b"") for row in rows_of(file))
    assert first == {**EVENT, "item_id": "i,1", "type": "rating", "value": 4.5}
    assert second == {**EVENT, "event_id": "e2", "item_id": "i2", "ts": "2023-11-14T22:13:20Z"}


def test_the_columns_of_a_csv_file_can_be_mapped(tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    file.write_text("who,what,did,at\n5,shoe,Bought,1700000000\n")
    mapping = parse_mapping(
        {
            "event_time_unit": "s",
            "fields": {"event_id": "line_id", "user_id": "who", "item_id": "what", "type": "did", "ts": "at"},
            "types": {"Bought": "purchase"},
        }
    )
    (row,) = rows_of(file)
    assert sent(interaction_record(row, mapping=mapping)).ts_ms == 1_700_000_000_000


def test_a_bad_csv_row_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    good = b"e1,u1,i1,click,1700000000000\n"
    header = b"event_id,user_id,item_id,type,ts\n"
    too_long = b"e3," + b"x" * 200_000 + b",i1,click,1700000000000\n"
    file.write_bytes(header + b"e0,u1,i1,click,1,surplus\n" + b"e2,\xff\xfe,i1,click,1700000000000\n" + too_long + good)
    found = [interaction_record(row) for row in rows_of(file)]
    assert [record.reason for record in found if isinstance(record, Rejected)] == [
        "BAD_JSON",
        "BAD_ENCODING",
        "BAD_JSON",
    ]
    assert isinstance(found[-1], Outgoing)


@pytest.mark.parametrize("name", ["events.jsonl", "events.jsonl.gz", "misnamed.jsonl"])
def test_gzip_is_recognised_by_content(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    content = json.dumps(EVENT).encode() + b"\n\n" + json.dumps(EVENT).encode()
    file.write_bytes(content if name == "events.jsonl" else gzip.compress(content))
    assert [(row.number, row.content) for row in rows_of(file)] == [
        (1, content[: len(content) // 2 - 1]),
        (3, content[: len(content) // 2 - 1]),
    ]


def test_a_gzip_file_that_is_cut_short_says_so_after_what_could_be_read(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl.gz"
    whole = gzip.compress(b"\n".join(json.dumps({**EVENT, "event_id": f"e{n}"}).encode() for n in range(50_000)))
    file.write_bytes(whole[: len(whole) // 2])
    read: list[Line] = []
    with open_source(str(file)) as source, pytest.raises(InputUnreadable):
        read.extend(source)
    assert len(read) > 1000


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"nothing\.jsonl: No such file"),
        open_source(str(tmp_path / "nothing.jsonl")),
    ):
        pass


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_rate_is_kept_over_many_records() -> None:
    clock = Clock()
    pace = Pace(rate=1000, clock=clock, sleep=clock.sleep)
    for _ in range(5001):
        pace.wait(None)
    assert clock.now - 100 == pytest.approx(5.0, abs=0.003)


def test_event_time_passes_as_many_times_faster_as_asked() -> None:
    clock = Clock()
    pace = Pace(speed_up=60, clock=clock, sleep=clock.sleep)
    passed = []
    for minutes in (0, 1, 1, 0, 10):  # one event out of order waits for nothing
        pace.wait(1_700_000_000_000 + minutes * 60_000)
        passed.append(clock.now - 100)
    assert passed == pytest.approx([0, 1, 1, 1, 10])


def test_without_a_rate_nothing_waits() -> None:
    clock = Clock()
    pace = Pace(clock=clock, sleep=clock.sleep)
    for ts_ms in (0, 10**12):
        pace.wait(ts_ms)
    assert clock.now == 100


def test_an_item_without_text_is_described_by_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "items.csv"
    file.write_text("item_id,title,genres,price,available\ni1,Toy Story,Animation,9,false\n")
    (row,) = rows_of(file)
    record = sent(item_record(row))
    assert record.key == b"i1"
    parsed = parse_item(record.key, record.value)
    assert parsed == CatalogueItem("i1", "Toy Story. Animation", {"price": "9"}, False)


def test_an_item_of_json_keeps_its_text_and_attributes() -> None:
    record = sent(item_record(line({"item_id": 3, "text": "Shoe", "tags": ["red", "light"], "attributes": {"a": 1}})))
    assert parse_item(record.key, record.value) == CatalogueItem("3", "Shoe", {"a": 1}, True)
    record = sent(item_record(line({"item_id": "3", "title": "Shoe", "tags": ["red", "light"]})))
    assert parse_item(record.key, record.value) == CatalogueItem("3", "Shoe. red, light", None, True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"text": "x"}, "MISSING_FIELD"),
        ({"item_id": "i"}, "MISSING_FIELD"),
        ({"item_id": "i", "text": "x", "available": "maybe"}, "BAD_TYPE"),
        (b"nonsense", "BAD_JSON"),
    ],
)
def test_an_item_that_no_worker_could_read_is_rejected(content: object, reason: str) -> None:
    found = item_record(line(content))
    assert isinstance(found, Rejected)
    assert found.reason == reason


@pytest.fixture
def stream(broker: Tansu) -> str:
    topics.ensure_topics(broker.address, {"interactions": {}, "items": topics.COMPACTED}, 4)
    return broker.address


def test_a_fed_file_arrives_whole_in_order_and_in_kafkas_partitions(
    stream: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "events.jsonl"
    events = [json.dumps({**EVENT, "event_id": f"e{n}", "user_id": f"u{n % 7}"}) for n in range(2000)]
    file.write_text("\n".join([*events[:1000], "{nonsense", *events[1000:]]))
    with open_source(str(file)) as source:
        fed = feed(stream, "interactions", source, interaction_record, pace=Pace())
    assert (fed.sent, fed.malformed, fed.failed, fed.complete) == (2000, 1, 0, False)
    assert "line 1001: BAD_JSON" in capsys.readouterr().err
    records = list(topics.read_topic(stream, "interactions"))
    assert sorted(record.value or b"" for record in records) == sorted(event.encode() for event in events)
    for record in records:
        assert record.partition == (murmur2(record.key) & 0x7FFFFFFF) % 4
    of_one_user = [record for record in records if record.key == b"u3"]
    assert [record.value for record in of_one_user] == [event.encode() for event in events[3::7]]


def test_end_offsets_count_every_record_of_a_batch(stream: str, tmp_path: Path) -> None:
    """Tansu answers ListOffsets with the base of the last batch, so a lag read that way would be too small."""
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join(json.dumps({**EVENT, "event_id": f"e{n}"}) for n in range(500)))
    with open_source(str(file)) as source:
        feed(stream, "interactions", source, interaction_record, pace=Pace(), limit=300)
    assert sum(topics.end_offsets(stream, "interactions").values()) == 300
    assert set(topics.beginning_offsets(stream, "interactions").values()) == {0}


def test_records_written_meanwhile_are_left_out_so_that_reading_ends(
    stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(event_id: str) -> None:
        file = tmp_path / "events.jsonl"
        file.write_text(json.dumps({**EVENT, "event_id": event_id}))
        with open_source(str(file)) as source:
            feed(stream, "interactions", source, interaction_record, pace=Pace())

    def ends_before_another_came(broker: str, topic: str) -> dict[int, int]:
        ends = end_offsets(broker, topic)
        add("late")
        return ends

    end_offsets = topics.end_offsets
    monkeypatch.setattr(topics, "end_offsets", ends_before_another_came)
    add("early")
    found = [json.loads(record.value or b"")["event_id"] for record in topics.read_topic(stream, "interactions")]
    assert found == ["early"]


def test_topics_are_made_once_and_another_partition_count_is_refused(broker: Tansu) -> None:
    wanted = {"interactions": {}, "items": topics.COMPACTED}
    assert topics.ensure_topics(broker.address, wanted, 3) == ["interactions", "items"]
    assert topics.ensure_topics(broker.address, {**wanted, "erasures": topics.NEVER_EXPIRING}, 3) == ["erasures"]
    with pytest.raises(
        topics.PartitionsDiffer, match="topic interactions has 3 partitions, INNERLOOP_PARTITIONS says 4"
    ):
        topics.ensure_topics(broker.address, {**wanted, "another": {}}, 4)
    assert topics.partition_counts(broker.address, ["another"]) == {}


def test_a_missing_topic_names_the_command_that_makes_it(broker: Tansu, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text(json.dumps(EVENT))
    with pytest.raises(topics.TopicMissing, match="innerloop migrate"), open_source(str(file)) as source:
        feed(broker.address, "interactions", source, interaction_record, pace=Pace())
    assert topics.partition_counts(broker.address, ["interactions"]) == {}
