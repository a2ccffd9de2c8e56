"""MovieLens-100K: real, titled, timestamped interactions, from a pinned wheel on the package index.

943 users, 1,682 films, 100,000 ratings (F. M. Harper and J. A. Konstan, "The MovieLens Datasets", 2015), as they ship
inside recbole 1.2.1.  The wheel is fetched without its dependencies and checked; the two files that are read are kept
under the home folder's cache and checked at every use.  The data is never part of this repository.
"""

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigurationError

Part = Literal["fit", "stream", "all"]
Phase = Literal["tune", "test"]

REQUIREMENT = "recbole==1.2.1 --hash=sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
FOLDER_IN_WHEEL = Path("recbole", "dataset_example", "ml-100k")
INTERACTIONS_FILE, ITEMS_FILE = "ml-100k.inter", "ml-100k.item"
FILE_SHA256 = {
    INTERACTIONS_FILE: "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    ITEMS_FILE: "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
# Seconds have many ties; this order of the tied events is part of every published figure.
TIE_SEED = 12_345
TUNE_SHARE, TEST_SHARE = 0.5, 0.8
FETCH_SECONDS = 300
# The ratings are of 1997 and 1998, and an event from before 2000 is refused (mostly it is a confusion of units): events
# are dated 25 years of 365.25 days later. Order and distances stay.
LATER_SECONDS = 788_940_000


class DatasetUnavailable(ConfigurationError):
    """The data set is neither in the cache nor to be had from the package index: do what the message says."""


@dataclass(frozen=True)
class Film:
    """One item of the catalogue."""

    item_id: str
    title: str
    year: int | None
    genres: tuple[str, ...]

    @property
    def text(self) -> str:
        """What the text encoder reads: "Toy Story (1995). Animation, Children's, Comedy"."""
        dated = self.title if self.year is None else f"{self.title} ({self.year})"
        return f"{dated}. {', '.join(self.genres)}" if self.genres else dated


@dataclass(frozen=True)
class MovieLens100K:
    """The ratings in file order, and the films.

    Attributes:
        users: [R] int64, the users' ids.
        items: [R] int64, the films' ids.
        ratings: [R] float32, 1 to 5.
        seconds: [R] int64, Unix time.
        films: the catalogue in file order.

    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    ratings: NDArray[np.float32]
    seconds: NDArray[np.int64]
    films: tuple[Film, ...]

    def rows(self, part: Part = "all", phase: Phase = "test") -> NDArray[np.int64]:
        """Row numbers of a part, in the order of the stream.

        Users are ordered by their first event.  Phase 'test' cuts at the first event of the user who stands at 80 %:
        'fit' is everything before that moment, 'stream' everything from then on.  Phase 'tune' cuts at 50 % and ends
        where 'test' begins to stream.
        """
        order = np.lexsort((np.random.default_rng(TIE_SEED).random(len(self.users)), self.seconds))
        tune_cut, test_cut = self._cuts()
        cut, end = (test_cut, np.iinfo(np.int64).max) if phase == "test" else (tune_cut, test_cut)
        start_at, end_at = np.searchsorted(self.seconds[order], [cut, end])
        bounds = {"fit": slice(0, start_at), "stream": slice(start_at, end_at), "all": slice(0, end_at)}
        return order[bounds[part]]

    def _cuts(self) -> tuple[int, int]:
        """The seconds of the first events of the users at 50 % and at 80 %, users ordered by first event, then id."""
        _, number = np.unique(self.users, return_inverse=True)
        first = np.full(int(number.max()) + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, number, self.seconds)
        ordered = np.sort(first)
        return int(ordered[int(TUNE_SHARE * len(first))]), int(ordered[int(TEST_SHARE * len(first))])

    def events(self, rows: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """The rows as events of the contract: id "ml-<row>", type "rating", `ts` in epoch ms, 25 years later."""
        columns = (self.users[rows], self.items[rows], self.ratings[rows], self.seconds[rows])
        for row, user, item, rating, seconds in zip(rows.tolist(), *(c.tolist() for c in columns), strict=True):
            yield {
                "v": 1,
                "event_id": f"ml-{row}",
                "user_id": str(user),
                "item_id": str(item),
                "type": "rating",
                "ts": (seconds + LATER_SECONDS) * 1000,
                "value": rating,
            }

    def catalogue(self) -> Iterator[dict[str, Any]]:
        """The films as items of the contract."""
        for film in self.films:
            attributes = {"title": film.title, "year": film.year, "genres": list(film.genres)}
            yield {"v": 1, "item_id": film.item_id, "text": film.text, "attributes": attributes, "available": True}


def load_ml100k(home: Path) -> MovieLens100K:
    """The data set, fetched on first use (2 MB) into `home`/cache/datasets.  Raises DatasetUnavailable."""
    folder = home / "cache" / "datasets" / "ml-100k"
    if not _is_whole(folder):
        _fetch(folder)
    return read_ml100k(folder)


def read_ml100k(folder: Path) -> MovieLens100K:
    """The data set in a folder that holds `ml-100k.inter` and `ml-100k.item`."""
    rows = _table(folder / INTERACTIONS_FILE)
    users, items, ratings, seconds = ([row[column] for row in rows] for column in range(4))
    return MovieLens100K(
        users=np.array(users, dtype=np.int64),
        items=np.array(items, dtype=np.int64),
        ratings=np.array(ratings, dtype=np.float32),
        seconds=np.array([int(float(second)) for second in seconds], dtype=np.int64),
        films=tuple(_film(*row) for row in _table(folder / ITEMS_FILE)),
    )


def write_jsonl(dataset: MovieLens100K, out: Path, *, part: Part = "all", phase: Phase = "test") -> tuple[Path, Path]:
    """Writes `interactions.jsonl.gz` (one part, in stream order) and `items.jsonl` (all films); returns their paths.

    The same part gives the same bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    interactions, items = out / "interactions.jsonl.gz", out / "items.jsonl"
    # Neither a name nor a time in the gzip header: they would change the bytes.
    with interactions.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0, compresslevel=6) as file:
        file.writelines(_line(event) for event in dataset.events(dataset.rows(part, phase)))
    with items.open("wb") as file:
        file.writelines(_line(item) for item in dataset.catalogue())
    return interactions, items


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _table(path: Path) -> list[list[str]]:
    """The rows of a tab-separated file without its header."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def _film(item_id: str, title: str, year: str, genres: str) -> Film:
    """One row of the catalogue; the file's one nameless film and one misread year are taken as what they are."""
    return Film(
        item_id=item_id,
        title="Unknown" if title == "unkonwn" else title,
        year=int(year) if year.isdigit() else None,
        genres=tuple(genre for genre in genres.split() if genre != "unknown"),
    )


def _is_whole(folder: Path) -> bool:
    """True when the cached files are there, byte for byte."""
    for name, sha256 in FILE_SHA256.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            return False
    return True


def _fetch(folder: Path) -> None:
    """Installs the pinned wheel into a folder that is thrown away, and keeps the two files that are read."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(REQUIREMENT + "\n")
        target = Path(scratch, "wheel")
        _install(requirements, target, folder)
        if not _is_whole(target / FOLDER_IN_WHEEL):
            raise DatasetUnavailable("the fetched ml-100k is not the data set that innerloop was measured on")
        for name in FILE_SHA256:
            # A copy, because installers link into their own cache; then one rename, so that no reader sees half a file.
            shutil.copyfile(target / FOLDER_IN_WHEEL / name, Path(scratch, name))
            Path(scratch, name).replace(folder / name)


def _install(requirements: Path, target: Path, folder: Path) -> None:
    """Lets the package installer at hand fetch and check the wheel (its sha256 is in the requirement)."""
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", str(target)]
    command = [*_installer(folder), *options, "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS)  # noqa: S603 - no shell
    except subprocess.TimeoutExpired as error:
        raise DatasetUnavailable(f"ml-100k was not fetched within {FETCH_SECONDS} s. {_by_hand(folder)}") from error
    if done.returncode != 0:
        raise DatasetUnavailable(f"ml-100k cannot be fetched: {_reason(done.stderr)}. {_by_hand(folder)}")


def _reason(stderr: str) -> str:
    """The line that says what went wrong: the first that speaks of an error, else the last."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no reason given"]
    return next((line for line in lines if line.lower().startswith("error")), lines[-1])[:300].rstrip(".")


def _installer(folder: Path) -> list[str]:
    """The running interpreter's pip, or uv beside it or on the path (environments made by uv have no pip)."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is None:
        raise DatasetUnavailable(f"ml-100k is fetched with pip or uv, and neither is here. {_by_hand(folder)}")
    return [uv, "pip", "install", "--python", sys.executable]


def _by_hand(folder: Path) -> str:
    return f"Or put {INTERACTIONS_FILE} and {ITEMS_FILE} of recbole 1.2.1 into {folder}"
