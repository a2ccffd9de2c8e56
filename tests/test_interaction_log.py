"""Logs from any file: order, bounded memory, guessed columns; and the cuts that both protocols make of them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from pipeline.adaptation import Types
from pipeline.backtest_data import load_log
from pipeline.foreign_columns import guess_columns
from pipeline.interaction_log import Collector, InteractionLog, ordered_by_id
from pipeline.protocols import TooLittleData, cut_static, cut_stream
from pipeline.settings import Settings
from pipeline.training_data import NothingToLearn
from schemas.events import Interaction

TYPES = Types.of({})
NOW = 1_700_000_000


def log_of(path: Path | str, *, items: str | None = None, most_users: int = 1000) -> tuple[InteractionLog, list[str]]:
    return load_log(
        str(path),
        items=items,
        mapping=None,
        most_users=most_users,
        types=TYPES,
        home=Settings.load().home,
        progress=lambda *_: None,
    )


def collected(rows: Iterable[tuple[str, str, int]], *, most_users: int = 1000) -> InteractionLog:
    collector = Collector(most_users)
    for number, (user, item, ts) in enumerate(rows):
        collector.add(Interaction(str(number), user, item, "click", ts, None, 0, number, 0))
    return collector.log({}, (TYPES.positive, TYPES.weight))


def test_movielens_is_cut_as_the_published_figures_were() -> None:
    log, _ = log_of("ml-100k")
    place = {item_id: number for number, item_id in enumerate(ordered_by_id(log.item_ids))}
    number = np.array([place[item_id] for item_id in log.item_ids])
    for phase, published in (("tune", "2a27de0057d704ce"), ("test", "714b4cb80f7e450b")):
        cut = cut_stream(log, "tune" if phase == "tune" else "test")
        columns = np.stack([log.users[cut.judged], number[log.items[cut.judged]], cut.num_events])
        assert hashlib.sha256(columns.astype(np.int32).tobytes()).hexdigest()[:16] == published
    static = cut_static(log)
    assert (len(static.users), len(static.fit)) == (152, 70_666)


def test_the_same_events_as_csv_json_and_parquet_give_the_same_log(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    draw = np.random.default_rng(0)
    columns = {
        "userId": draw.integers(1, 30, 400).tolist(),
        "movieId": draw.integers(1, 50, 400).tolist(),
        "rating": draw.integers(1, 6, 400).tolist(),
        "timestamp": (NOW + draw.permutation(400)).tolist(),
    }
    rows = list(zip(*columns.values(), strict=True))
    csv, jsonl, parquet = tmp_path / "a.csv", tmp_path / "a.jsonl.gz", tmp_path / "a.parquet"
    csv.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]))
    with gzip.open(jsonl, "wt") as file:
        file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.table(columns), parquet)
    logs = [log_of(path)[0] for path in (csv, jsonl, parquet)]
    for log in logs:
        assert log.item_ids == logs[0].item_ids
        for name in ("users", "items", "times"):
            assert np.array_equal(getattr(log, name), getattr(logs[0], name)), name
    assert len(logs[0]) == 400
    assert (np.diff(logs[0].times) > 0).all()
    assert logs[0].times[0] == NOW * 1000


def test_a_file_in_time_order_keeps_its_order_and_ties_elsewhere_are_not_broken_by_id() -> None:
    kept = collected([("b", "2", 5), ("a", "1", 5), ("a", "0", 6)])
    assert [kept.item_ids[item] for item in kept.items] == ["2", "1", "0"]
    items = [str(number) for number in range(50)]
    drawn = collected([("a", "last", 9), *(("a", item, 5) for item in items)])
    order = [drawn.item_ids[item] for item in drawn.items]
    assert order[-1] == "last"
    assert order[:-1] != items


def test_more_users_than_asked_for_are_halved_by_hash_and_keep_all_their_events() -> None:
    rows = [(f"u{number % 100}", str(number % 7), number) for number in range(1000)]
    log = collected(rows, most_users=30)
    assert 3 <= len(log.user_ids) <= 30
    assert set(np.bincount(log.users)) == {10}
    assert log.share_of_users in (0.25, 0.125)
    assert log.user_ids == collected(reversed(rows), most_users=30).user_ids, "in whatever order they come"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"user": "a", "sku": "x", "time": "2021-05-04 10:00:00"}, "every event is a click"),
        ({"userId": 1, "movieId": 2, "rating": 4.0, "timestamp": 964982703}, "every event is a rating"),
        ({"user_id": 1, "item_id": 2, "rating": 4, "timestamp": 881250949}, "25 years later"),
        ({"Customer ID": 13085.0, "StockCode": "85048", "InvoiceDate": "2010-12-01"}, "user_id from 'Customer ID'"),
        ({"reviewerID": "A1", "asin": "B0", "overall": 5.0, "time": 1370044800}, "every event is a rating"),
    ],
)
def test_columns_are_found_by_their_usual_names(row: dict[str, object], said: str) -> None:
    guessed = guess_columns(row)
    assert guessed is not None
    assert said in guessed.as_text()
    message = guessed.translate({"line_id": "l", **row})
    assert message["ts"] > 946_684_800_000
    assert isinstance(message["user_id"], str | int)


def test_a_file_that_begins_long_ago_keeps_what_is_older_still(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text("userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n2,31,4.0,855000000\n")
    log, notes = log_of(path)
    assert len(log.users) == 2
    assert "25 years later" in notes[0]


def test_what_cannot_be_read_names_the_option_to_change(tmp_path: Path) -> None:
    path = tmp_path / "strange.jsonl"
    path.write_text('{"who": 1, "what": 2}\n')
    with pytest.raises(NothingToLearn, match=r"MISSING_FIELD.*--mapping"):
        log_of(path)
    with pytest.raises(TooLittleData, match="--protocol stream"):
        cut_static(collected([(f"u{number % 50}", str(number % 9), number) for number in range(200)]))
    with pytest.raises(TooLittleData, match="same time"):
        cut_stream(collected([("a", "1", 5), ("b", "2", 5)]))


def test_a_file_with_nothing_to_learn_is_told_by_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "clicks.csv"
    path.write_text("who,what\n1,2\n")
    with pytest.raises(NothingToLearn, match=r"1 MISSING_FIELD\); its fields are who, what; --mapping"):
        log_of(path)
    path.write_text("user_id,item_id,timestamp\n")
    with pytest.raises(NothingToLearn, match="no events: the file is empty"):
        log_of(path)
