"""Artefacts: whole or not at all, in a folder and in an object store alike."""

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline import failpoints
from pipeline.artefacts import ArtefactMissing, Artefacts, ArtefactsUnavailable
from schemas.errors import ConfigurationError

PAYLOAD = b"some bytes that are no parameters"
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


@pytest.fixture(params=["folder", "object store", "s3"])
def artefacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artefacts:
    if request.param == "folder":
        return Artefacts(tmp_path / "deep")
    if request.param == "s3":
        return Artefacts(f"s3://{request.getfixturevalue('bucket')}/deep")
    return Artefacts(f"memory://{uuid.uuid4().hex}/deep")


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


def test_without_its_package_a_scheme_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("pipeline.artefacts.fsspec.url_to_fs", missing)
    with pytest.raises(ConfigurationError, match=r"s3://a/b needs .* pip install 'innerloop\[s3\]'"):
        Artefacts("s3://a/b")


def test_an_object_store_that_does_not_answer_or_refuses_says_what_to_check(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Artefacts(f"s3://{bucket}/deep")
    with pytest.raises(OSError, match=r"bucket|exist"):
        Artefacts("s3://no-such-bucket").write(SHA256, PAYLOAD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(there._files, "cat_file", refuse)
    with pytest.raises(ArtefactsUnavailable, match=r"Access Denied.*keys"):
        there.read(SHA256)
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(ArtefactsUnavailable, match=r"does not answer.*AWS_ENDPOINT_URL"):
        Artefacts(f"s3://{bucket}/deep").read(SHA256)
