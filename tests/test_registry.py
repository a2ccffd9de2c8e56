"""The registry: a version is on disk, whole, before its row; and no stored text becomes a path."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sqlalchemy import Connection, Engine, text

from models.checkpoint import ArtefactRefused
from pipeline import failpoints, registry
from pipeline.artefacts import ArtefactMissing, Artefacts
from schemas.database import connect_engine
from tests.conftest import Database
from tests.factories import meta_parameters


def register(engine: Engine, home: Path, seed: int = 0) -> registry.Registered:
    return registry.register(
        engine, Artefacts(home), meta_parameters(["a", "b"], seed=seed), metrics={"x": 1}, provenance={}
    )


def test_the_first_version_is_live_and_later_ones_are_its_challengers(writer: Engine, tmp_path: Path) -> None:
    first, second = register(writer, tmp_path, 0), register(writer, tmp_path, 1)
    assert (first.status, second.status) == ("live", "challenger")
    version, parameters = registry.load_live(writer, Artefacts(tmp_path))
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
        registry.load_live(writer, Artefacts(tmp_path))


def test_a_version_whose_file_is_not_here_says_where_it_belongs(writer: Engine, tmp_path: Path) -> None:
    made = register(writer, tmp_path / "trainer")
    with pytest.raises(ArtefactMissing, match=f"{made.sha256}.safetensors"):
        registry.load_live(writer, Artefacts(tmp_path / "worker"))


def test_another_versions_file_under_its_name_is_refused(writer: Engine, tmp_path: Path) -> None:
    first, second = register(writer, tmp_path, 0), register(writer, tmp_path, 1)
    paths = [tmp_path / f"{made.sha256}.safetensors" for made in (first, second)]
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ArtefactRefused, match="HASH_MISMATCH: the bytes are not those that were registered"):
        registry.load_live(writer, Artefacts(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_refused(damage: str, writer: Engine, tmp_path: Path) -> None:
    made = register(writer, tmp_path)
    path = tmp_path / f"{made.sha256}.safetensors"
    payload = bytearray(path.read_bytes())
    payload[-10] ^= 1
    path.write_bytes(payload if damage == "flipped" else payload[: len(payload) // 2])
    with pytest.raises(ArtefactRefused, match="HASH_MISMATCH"):
        registry.load_live(writer, Artefacts(tmp_path))


@pytest.mark.parametrize("stored", ["../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", ""])
def test_a_stored_hash_that_is_none_never_becomes_a_path(stored: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactMissing, match="is not a SHA-256"):
        Artefacts(tmp_path).read(stored)


@pytest.mark.parametrize("place", ["mid_artifact_write", "after_artifact_before_publish"])
def test_what_a_failed_registration_left_is_collected_and_nothing_else(
    place: str, writer: Engine, tmp_path: Path
) -> None:
    kept = register(writer, tmp_path, 0)
    (tmp_path / f"{'0' * 64}.safetensors").write_bytes(b"of another database")
    failpoints.arm(f"{place}=error")
    try:
        with pytest.raises(failpoints.FailpointReached):
            register(writer, tmp_path, 1)
    finally:
        failpoints.arm("")
    assert len(registry.collect_orphans(writer, Artefacts(tmp_path))) == 1
    assert registry.collect_orphans(writer, Artefacts(tmp_path)) == []
    assert sorted(Artefacts(tmp_path).names()) == sorted([f"{'0' * 64}.safetensors", f"{kept.sha256}.safetensors"])


def test_a_registered_artefact_is_no_orphan_although_its_writing_began_again(writer: Engine, tmp_path: Path) -> None:
    made = register(writer, tmp_path, 0)
    failpoints.arm("after_artifact_before_publish=error")
    try:
        with pytest.raises(failpoints.FailpointReached):
            register(writer, tmp_path, 0)
    finally:
        failpoints.arm("")
    assert registry.collect_orphans(writer, Artefacts(tmp_path)) == []
    assert registry.load(writer, Artefacts(tmp_path), made.version).item_ids == ("a", "b")


def test_a_request_leads_to_one_version_however_often_it_is_registered(writer: Engine, tmp_path: Path) -> None:
    register(writer, tmp_path, 0)
    with writer.begin() as connection:
        connection.execute(
            text("INSERT INTO innerloop.retrain_requests (reason, window_from_ms, window_to_ms) VALUES ('drift', 1, 2)")
        )
    made = [
        registry.register(
            writer, Artefacts(tmp_path), meta_parameters(["a"], seed=seed), metrics={}, provenance={}, request=1
        )
        for seed in (1, 2)
    ]
    assert made[0] == made[1]
    assert len(Artefacts(tmp_path).names()) == 2


def test_states_are_mapped_between_versions_both_ways_and_by_way_of_one_another(writer: Engine, tmp_path: Path) -> None:
    items = [f"i{number}" for number in range(60)]
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))).Q
    first = meta_parameters(items)
    second = replace(first, item_factors=first.item_factors @ turn)
    third = replace(first, item_factors=second.item_factors @ turn)
    artefacts = Artefacts(tmp_path)
    for parameters in (first, second, third):
        registry.register(writer, artefacts, parameters, metrics={}, provenance={})
    registry.map_states(writer, artefacts, 1, 2)
    registry.map_states(writer, artefacts, 2, 3)
    maps = registry.load_state_maps(writer, 3)
    assert sorted(maps) == [1, 2]
    np.testing.assert_allclose(maps[2], turn.double().numpy(), atol=0.01)
    np.testing.assert_allclose(maps[1], (turn @ turn).double().numpy(), atol=0.02)
    np.testing.assert_allclose(registry.load_state_maps(writer, 1)[2], turn.T.double().numpy(), atol=0.01)


def test_versions_that_share_hardly_an_item_have_no_map(writer: Engine, tmp_path: Path) -> None:
    for items in (["a", "b"], ["b", "c"]):
        registry.register(writer, Artefacts(tmp_path), meta_parameters(items), metrics={}, provenance={})
    registry.map_states(writer, Artefacts(tmp_path), 1, 2)
    assert registry.load_state_maps(writer, 2) == {}
