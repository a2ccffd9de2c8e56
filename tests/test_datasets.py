"""MovieLens-100K: fetched once, checked always, and cut as the published figures were."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline import datasets
from pipeline.datasets import DatasetUnavailable, MovieLens100K, load_ml100k, read_ml100k, write_jsonl
from schemas.events import CatalogueItem, Interaction, parse_interaction, parse_item

NOW_MS = 1_704_067_200_000  # later than the shifted dates, as any clock is
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
FILMS = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tAnimation Children's Comedy\n"
    "267\tunkonwn\tunkonwn\tunknown\n"
    "1412\tLand Before Time III (1995)\tV\tAnimation\n"
)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the real data set in its cache."""
    folder = tmp_path_factory.mktemp("home")
    try:
        load_ml100k(folder)
    except DatasetUnavailable as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture
def ten_users(tmp_path: Path) -> MovieLens100K:
    """Ten users who each come once a minute for three minutes, user n for the first time at second 10 n."""
    rows = [
        f"{user}\t1\t{user % 5 + 1}\t{10 * user + 60 * visit}\n" for visit in (1, 0, 2) for user in range(10, 0, -1)
    ]
    (tmp_path / "ml-100k.inter").write_text(HEADER + "".join(rows))
    (tmp_path / "ml-100k.item").write_text(FILMS)
    return read_ml100k(tmp_path)


def test_the_stream_is_the_referees(home: Path) -> None:
    data = load_ml100k(home)
    users = np.unique(data.users, return_inverse=True)[1]
    items = np.unique(data.items, return_inverse=True)[1]
    for phase, fit, published in (("tune", 46_333, "2a27de0057d704ce"), ("test", 80_393, "714b4cb80f7e450b")):
        rows = data.rows("all", phase)  # type: ignore[arg-type]  # a loop over two literals is a str to mypy
        u, i = users[rows], items[rows]
        before = np.zeros(len(rows), dtype=int)
        seen = np.zeros(943, dtype=int)
        for event, user in enumerate(u):
            before[event] = seen[user]
            seen[user] += 1
        stream = np.stack([u[fit:], i[fit:], before[fit:]]).astype(np.int32)
        assert hashlib.sha256(stream.tobytes()).hexdigest()[:16] == published
        assert len(data.rows("fit", phase)) == fit  # type: ignore[arg-type]  # as above


def test_the_data_set_is_the_published_one(home: Path) -> None:
    data = load_ml100k(home)
    assert (len(data.users), len(set(data.users.tolist())), len(data.films)) == (100_000, 943, 1682)
    assert {film.item_id for film in data.films} == {str(item) for item in data.items.tolist()}


def test_the_decoder_accepts_every_event_and_every_film(home: Path) -> None:
    data = load_ml100k(home)
    rows = data.rows()
    ends = np.concatenate([rows[:200], rows[-200:]])  # the earliest and the latest: the dates are what may be refused
    for event in data.events(ends):
        parsed = parse_interaction(event["user_id"].encode(), json.dumps(event).encode(), NOW_MS)
        assert isinstance(parsed, Interaction), parsed
    for item in data.catalogue():
        assert isinstance(parse_item(item["item_id"].encode(), json.dumps(item).encode()), CatalogueItem)


def test_a_damaged_cache_is_fetched_again(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home")
    file = tmp_path / "home" / "cache" / "datasets" / "ml-100k" / "ml-100k.inter"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"9")
    load_ml100k(tmp_path / "home")
    assert file.read_bytes() == whole
    assert sorted(p.name for p in file.parent.iterdir()) == ["ml-100k.inter", "ml-100k.item"]


def test_a_cached_data_set_needs_no_installer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_installer(folder: Path) -> list[str]:
        pytest.fail("asked for an installer")

    monkeypatch.setattr(datasets, "_installer", no_installer)
    load_ml100k(home)


def test_without_an_installer_the_error_says_where_to_put_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DatasetUnavailable, match=r"pip or uv.*ml-100k.inter and ml-100k.item"):
        load_ml100k(tmp_path)


def test_an_installer_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "uv"
    failing.write_text("#!/bin/sh\necho 'warning: slow' >&2\necho 'error: no route to the index' >&2\nexit 2\n")
    failing.chmod(0o755)
    monkeypatch.setattr(datasets, "_installer", lambda folder: [str(failing)])
    with pytest.raises(DatasetUnavailable, match="error: no route to the index"):
        load_ml100k(tmp_path)


def test_a_wheel_with_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = tmp_path / "uv"
    idle.write_text("#!/bin/sh\nexit 0\n")
    idle.chmod(0o755)
    monkeypatch.setattr(datasets, "_installer", lambda folder: [str(idle)])
    with pytest.raises(DatasetUnavailable, match="not the data set"):
        load_ml100k(tmp_path)


def test_parts_are_cut_at_first_events_and_ordered_by_time(ten_users: MovieLens100K) -> None:
    # Users 1…10 first come at 10, 20, … 100: the ninth (80 %) at 90, the sixth (50 %) at 60.
    assert ten_users.seconds[ten_users.rows("fit")].max() < 90 == ten_users.seconds[ten_users.rows("stream")].min()
    tuned = ten_users.seconds[ten_users.rows("stream", "tune")]
    assert (tuned.min(), tuned.max()) == (60, 80)
    everything = ten_users.rows()
    assert sorted(everything.tolist()) == list(range(30))
    assert (np.diff(ten_users.seconds[everything]) >= 0).all()
    assert np.concatenate([ten_users.rows("fit"), ten_users.rows("stream")]).tolist() == everything.tolist()


def test_films_read_as_text(ten_users: MovieLens100K) -> None:
    assert [film.text for film in ten_users.films] == [
        "Toy Story (1995). Animation, Children's, Comedy",
        "Unknown",
        "Land Before Time III (1995). Animation",
    ]


def test_events_are_those_of_the_contract(ten_users: MovieLens100K) -> None:
    first = ten_users.rows()[0]
    assert next(ten_users.events(ten_users.rows())) == {
        "v": 1,
        "event_id": f"ml-{first}",
        "user_id": "1",
        "item_id": "1",
        "type": "rating",
        "ts": 788_940_010_000,
        "value": 2.0,
    }


def test_files_hold_the_part_and_are_the_same_bytes_each_time(ten_users: MovieLens100K, tmp_path: Path) -> None:
    interactions, items = write_jsonl(ten_users, tmp_path / "a", part="stream")
    again, _ = write_jsonl(ten_users, tmp_path / "b", part="stream")
    assert interactions.read_bytes() == again.read_bytes()
    # Bytes 4 to 8 of a gzip file are its time: equal above only because both were written in one second, if not zero.
    assert interactions.read_bytes()[4:8] == bytes(4)
    events = [json.loads(line) for line in gzip.decompress(interactions.read_bytes()).splitlines()]
    assert [event["event_id"] for event in events] == [f"ml-{row}" for row in ten_users.rows("stream")]
    catalogue = [json.loads(line) for line in items.read_bytes().splitlines()]
    assert [item["item_id"] for item in catalogue] == ["1", "267", "1412"]
    assert catalogue[0]["attributes"]["genres"] == ["Animation", "Children's", "Comedy"]
