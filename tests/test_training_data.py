"""What meta-training reads is what a worker would have applied."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import topics, training_data
from pipeline.adaptation import Types
from pipeline.feeding import feed
from pipeline.lines import open_source
from pipeline.outbox import Outbox
from pipeline.produce import Pace, interaction_record
from pipeline.trainer_window import erased_since
from pipeline.training_data import NothingToLearn, Window
from schemas.events import Interaction
from tests.brokers import Tansu

START_MS = 1_700_000_000_000
WEIGHTS = Types.of({}).weight * Types.of({}).positive


def event(number: int, **changes: object) -> str:
    fields = {"user_id": "u1", "item_id": "b", "type": "click", "ts": START_MS + number, "event_id": f"e{number}"}
    return json.dumps(fields | changes)


def window_of(path: Path, *lines: str) -> Window:
    path.write_text("\n".join(lines))
    return training_data.collect(training_data.events_of_file(str(path), None), WEIGHTS, lambda _: None)


def test_positives_are_kept_with_their_weights_and_the_rest_is_counted(tmp_path: Path) -> None:
    window = window_of(
        tmp_path / "events.jsonl",
        event(1, type="purchase"),
        event(2, type="impression"),
        event(3, type="dismiss"),
        event(4, type="view"),
        "{",
    )
    assert window.weights == [4.0, pytest.approx(0.3)]
    assert dict(window.rejected) == {"BAD_JSON": 1}


def test_a_repeated_event_counts_once_and_only_within_its_user(tmp_path: Path) -> None:
    window = window_of(tmp_path / "events.jsonl", event(1), event(1), event(1, user_id="u2"))
    assert window.users == ["u1", "u2"]


def test_events_are_in_the_order_of_their_time_and_ties_as_they_were_read(tmp_path: Path) -> None:
    columns = training_data.numbered(
        window_of(
            tmp_path / "events.jsonl",
            event(5, item_id="ä"),
            event(1, item_id="z", user_id="u2"),
            event(2, ts=START_MS + 5, item_id="Z"),
        )
    )
    assert columns.item_ids == ("Z", "z", "ä")  # by bytes
    assert columns.items.tolist() == [1, 2, 0]
    assert columns.users.tolist() == [0, 1, 1]
    assert np.diff(columns.times).tolist() == [4, 0]
    assert columns.num_users == 2


def test_many_events_of_one_moment_keep_their_order(tmp_path: Path) -> None:
    lines = [event(n, ts=START_MS, item_id=f"i{n:03}") for n in range(300)]
    columns = training_data.numbered(
        window_of(tmp_path / "events.jsonl", *reversed(lines), event(999, ts=START_MS - 1))
    )
    assert columns.items.tolist() == [0, *range(300, 0, -1)]  # the earlier event's item "b" sorts before "i000"


def test_without_a_positive_event_the_reasons_are_named(tmp_path: Path) -> None:
    with pytest.raises(NothingToLearn, match=r"no positive event to learn from \(rejected: 2 BAD_JSON\)"):
        training_data.numbered(window_of(tmp_path / "events.jsonl", "{", "[", event(1, type="impression")))
    with pytest.raises(NothingToLearn, match=r"2 MISSING_FIELD\); --mapping FILE.toml"):
        training_data.numbered(window_of(tmp_path / "foreign.jsonl", '{"who": 1}', '{"who": 2}'))


def test_the_topic_gives_the_same_window_as_the_file_it_was_fed_from(broker: Tansu, tmp_path: Path) -> None:
    topics.ensure_topics(broker.address, {"interactions": {}}, 3)
    rng = np.random.default_rng(0)
    lines = [event(n, user_id=f"u{rng.integers(9)}", item_id=f"i{rng.integers(20)}") for n in range(500)]
    from_file = training_data.numbered(window_of(tmp_path / "events.jsonl", *lines))
    with open_source(str(tmp_path / "events.jsonl")) as source:
        feed(broker.address, "interactions", source, interaction_record, pace=Pace())
    events = training_data.events_of_topic(broker.address, "interactions", None, erased={})
    from_topic = training_data.numbered(training_data.collect(events, WEIGHTS, lambda _: None))
    for name in ("users", "items", "times", "weights", "item_ids"):
        assert np.array_equal(getattr(from_topic, name), getattr(from_file, name)), name


def test_the_last_text_of_an_item_wins_and_a_withdrawn_item_keeps_its_own(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    items = [{"item_id": "a", "text": "old"}, {"item_id": "a", "text": "new", "available": False}, {"item_id": "b"}]
    file.write_text("\n".join(json.dumps(item) for item in items))
    assert training_data.texts_of_file(str(file)) == {"a": "new"}


def test_a_window_holds_the_records_of_its_time_without_what_erased_users_did_before(broker: Tansu) -> None:
    topics.ensure_topics(broker.address, {"interactions": {}, "erasures": {}}, 2)

    def send(topic: str, user: str, value: str) -> None:
        with Outbox(broker.address, topic) as outbox:
            outbox.send(0, user.encode(), value.encode())
        time.sleep(0.01)

    for number, user in enumerate(["u1", "u2", "u3"]):
        send("interactions", user, event(number, user_id=user, v=1))
    since = time.time_ns() // 1_000_000
    for number, user in enumerate(["u1", "u2"]):
        send("interactions", user, event(10 + number, user_id=user, v=1))
    send("erasures", "u1", json.dumps({"v": 1, "user_id": "u1", "requested_at": START_MS}))
    send("interactions", "u1", event(20, user_id="u1", v=1, ts=time.time_ns() // 1_000_000))
    send("interactions", "u1", event(21, user_id="u1", v=1))  # late: it happened before
    erased = training_data.erasures_of_topic(broker.address, "erasures")
    assert list(erased) == ["u1"]

    def found(since_ms: int) -> list[str]:
        window = training_data.window_of_topic(
            broker.address, "interactions", None, since_ms=since_ms, erased=erased, progress=lambda _: None
        )
        return [one.event.event_id for one in window if isinstance(one.event, Interaction)]

    assert found(0) == ["e1", "e2", "e11", "e20"]
    assert found(since) == ["e11", "e20"]
    assert found(since + 10**7) == []
    everything = training_data.events_of_topic(broker.address, "interactions", None, erased=erased)
    kept = {one.event_id for one in everything if isinstance(one, Interaction)}
    assert kept == {"e1", "e2", "e11", "e20"}, "what `meta-train` learns from leaves them out as well"


def test_a_version_is_marked_with_those_it_learnt_from_who_asked_meanwhile_to_be_forgotten() -> None:
    before, now = {"u1": 5, "u2": 5}, {"u1": 5, "u2": 9, "u3": 9, "u4": 9}
    assert erased_since({"u2", "u3", "u7"}, before, now) == {"erased_before": 2, "erased_meanwhile": 2}
