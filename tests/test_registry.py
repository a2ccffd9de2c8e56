"""The registry: a version is on disk, whole, before its row; and no stored text becomes a path."""

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text

from models.checkpoint import ArtefactRefused
from pipeline import registry
from schemas.database import connect_engine
from tests.conftest import Database
from tests.factories import meta_parameters


@pytest.fixture
def writer(database: Database) -> Iterator[Engine]:
    engine = connect_engine(database.writer_url)
    yield engine
    engine.dispose()


def register(engine: Engine, home: Path, seed: int = 0) -> registry.Registered:
    return registry.register(engine, home, meta_parameters(["a", "b"], seed=seed), metrics={"x": 1}, provenance={})


def test_the_first_version_is_live_and_later_ones_are_its_challengers(writer: Engine, tmp_path: Path) -> None:
    first, second = register(writer, tmp_path, 0), register(writer, tmp_path, 1)
    assert (first.status, second.status) == ("live", "challenger")
    version, parameters = registry.load_live(writer, tmp_path)
    assert version == first.version == registry.live_version(writer)
    assert parameters.item_ids == ("a", "b")
    with writer.connect() as connection:
        query = text("SELECT parent, artefact, live_since IS NULL FROM innerloop.meta_versions ORDER BY version")
        rows = connection.execute(query).all()
    assert [tuple(row) for row in rows] == [
        (None, f"artefacts/{first.sha256}.safetensors", False),
        (first.version, f"artefacts/{second.sha256}.safetensors", True),
    ]


def test_of_two_first_registrations_at_once_one_becomes_live(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(connection: Connection) -> int | None:
        version = look(connection)
        time.sleep(0.2)  # long enough for all to look before one has written
        return version

    look = registry._live_version
    monkeypatch.setattr(registry, "_live_version", slowly)
    found: list[str] = []

    def train(seed: int) -> None:
        engine = connect_engine(database.writer_url)
        found.append(register(engine, tmp_path, seed).status)
        engine.dispose()

    trainers = [threading.Thread(target=train, args=(seed,)) for seed in range(4)]
    for thread in trainers:
        thread.start()
    for thread in trainers:
        thread.join()
    assert sorted(found) == ["challenger"] * 3 + ["live"]


def test_without_a_live_version_the_command_that_makes_one_is_named(writer: Engine, tmp_path: Path) -> None:
    assert registry.live_version(writer) is None
    with pytest.raises(registry.NoLiveVersion, match="innerloop meta-train"):
        registry.load_live(writer, tmp_path)


def test_a_version_whose_file_is_not_here_says_where_it_belongs(writer: Engine, tmp_path: Path) -> None:
    made = register(writer, tmp_path / "trainer")
    with pytest.raises(registry.ArtefactMissing, match=f"{made.sha256}.safetensors"):
        registry.load_live(writer, tmp_path / "worker")


def test_another_versions_file_under_its_name_is_refused(writer: Engine, tmp_path: Path) -> None:
    first, second = register(writer, tmp_path, 0), register(writer, tmp_path, 1)
    paths = [registry.artefact_path(tmp_path, made.sha256) for made in (first, second)]
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ArtefactRefused, match="HASH_MISMATCH: the bytes are not those that were registered"):
        registry.load_live(writer, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_refused(damage: str, writer: Engine, tmp_path: Path) -> None:
    made = register(writer, tmp_path)
    path = registry.artefact_path(tmp_path, made.sha256)
    payload = bytearray(path.read_bytes())
    payload[-10] ^= 1
    path.write_bytes(payload if damage == "flipped" else payload[: len(payload) // 2])
    with pytest.raises(ArtefactRefused, match="HASH_MISMATCH"):
        registry.load_live(writer, tmp_path)


@pytest.mark.parametrize("stored", ["../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", ""])
def test_a_stored_hash_that_is_none_never_becomes_a_path(stored: str, tmp_path: Path) -> None:
    with pytest.raises(registry.ArtefactMissing, match="is not a SHA-256"):
        registry.artefact_path(tmp_path, stored)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = b"content"
    sha256 = hashlib.sha256(payload).hexdigest()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.registry.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            registry.write_artefact(tmp_path, sha256, payload)
    assert list((tmp_path / "artefacts").iterdir()) == []
    path = registry.write_artefact(tmp_path, sha256, payload)
    assert path.read_bytes() == payload
    path.write_bytes(b"damaged")
    assert registry.write_artefact(tmp_path, sha256, payload).read_bytes() == payload
