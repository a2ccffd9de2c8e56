"""Artefacts: whole or not at all, in a folder and in an object store alike."""

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import failpoints
from pipeline.artefacts import ArtefactMissing, Artefacts
from schemas.errors import ConfigurationError

PAYLOAD = b"some bytes that are no parameters"
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


@pytest.fixture(params=["folder", "object store"])
def artefacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artefacts:
    return Artefacts(tmp_path / "deep" if request.param == "folder" else f"memory://{uuid.uuid4().hex}/deep")


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_what_was_written_is_read_back_and_can_be_removed(artefacts: Artefacts) -> None:
    assert artefacts.names() == []
    artefacts.write(SHA256, PAYLOAD)
    artefacts.write(SHA256, PAYLOAD)
    assert artefacts.read(SHA256) == PAYLOAD
    assert artefacts.names() == [f"{SHA256}.safetensors"]
    artefacts.remove(SHA256)
    artefacts.remove(SHA256)
    assert artefacts.names() == []
    with pytest.raises(ArtefactMissing, match=f"{SHA256}.safetensors is not there"):
        artefacts.read(SHA256)


def test_a_writer_that_fails_half_way_leaves_nothing_to_read(artefacts: Artefacts) -> None:
    failpoints.arm("mid_artifact_write=error")
    with pytest.raises(failpoints.FailpointReached):
        artefacts.write(SHA256, PAYLOAD)
    assert artefacts.names() == []


def test_what_a_killed_writer_left_is_removed_with_its_artefact(tmp_path: Path) -> None:
    (tmp_path / f".writing-{SHA256}-abc").write_bytes(PAYLOAD[:5])
    (tmp_path / f".writing-{'0' * 64}-abc").write_bytes(b"another's")
    Artefacts(tmp_path).remove(SHA256)
    assert Artefacts(tmp_path).names() == [f".writing-{'0' * 64}-abc"]


def test_damaged_bytes_under_a_name_are_replaced(artefacts: Artefacts) -> None:
    artefacts.write(SHA256, b"damaged")
    artefacts.write(SHA256, PAYLOAD)
    assert artefacts.read(SHA256) == PAYLOAD


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.artefacts.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        Artefacts(tmp_path).write(SHA256, PAYLOAD)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_names_the_setting() -> None:
    with pytest.raises(ConfigurationError, match="INNERLOOP_ARTEFACTS=floppy://a"):
        Artefacts("floppy://a")
