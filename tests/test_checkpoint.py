"""The artefact of meta-parameters: what is written comes back, and nothing else is let in."""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.checkpoint import MAX_HEADER_BYTES, ArtefactRefused, from_bytes, to_bytes
from models.meta_parameters import NUM_BUCKETS, MetaParameters
from models.repeats import SHAPE

N, T, D, F, P, M = 7, 5, 4, 3, 2, 2


def small_parameters(**changes: object) -> MetaParameters:
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    values: dict[str, object] = {
        "item_ids": (*(f"film-{i}" for i in range(N - 1)), "ümlaut"),
        "encoder": "hashed-bag-of-words-1:5",
        "parts": ("near", "far"),
        "support_size": 60,
        "recommend_seen": False,
        "pairs_online": True,
        "use_inner_step": True,
        "learner": "honest",
        "adapter": "vector",
        "residuals": "honest",
        "step_from": 3,
        "tau": 1.25,
        "discount": 0.99,
        "trust_radius": 2.0,
        "gate_discount": 0.95,
        "gate_credit": 0.5,
        "shrinkage": 10.0,
        "half_life": 5000.0,
        "item_out": draw(N, D),
        "item_in": draw(N, P, D),
        "item_spread": draw(N, P).abs(),
        "neighbour_items": torch.randint(-1, N, (N, M), generator=noise),
        "neighbour_values": draw(N, M, P),
        "pair_counts": draw(N, M, 1).abs(),
        "pair_means": draw(N, 1),
        "pair_worth": draw(1).abs(),
        "pseudo_events": draw(1).abs(),
        "item_bias": draw(N),
        "item_users": draw(N).abs(),
        "item_factors": draw(N, F),
        "item_events": draw(N).abs(),
        "residual_mean": draw(F),
        "metric": draw(F).abs(),
        "precision": draw(F).abs(),
        "adapter_initial": torch.zeros(F),
        "step_rates": torch.zeros(0, F),
        "text_map": draw(T + 1, D + P * D + F),
        "context_map": draw(D + F + 1, D),
        "pace_direction": draw(D),
        "usual_pace": 0.002,
        "part_decays": draw(P).abs(),
        "memory_decays": draw(1, P).abs(),
        "memory_discount": 0.8,
        "memory_rate": 0.5,
        "memory_caution": 2.0,
        "part_weights": draw(NUM_BUCKETS, 1 + P),
        "scene_shares": draw(NUM_BUCKETS).abs(),
        "repeat_profile": draw(*SHAPE),
        "repeat_shares": draw(NUM_BUCKETS),
        "calibration": draw(NUM_BUCKETS, 2).abs(),
        "counts": draw(NUM_BUCKETS, N).abs(),
    }
    return MetaParameters(**{**values, **changes})  # type: ignore[arg-type]  # a table of fields, typed by the class


def assert_equal(left: MetaParameters, right: MetaParameters) -> None:
    assert left.metadata() == right.metadata()
    for name, tensor in left.tensors().items():
        assert torch.equal(tensor, right.tensors()[name]), name


def refused(payload: bytes, *, sha256: str | None = None) -> str:
    with pytest.raises(ArtefactRefused) as caught:
        from_bytes(payload, sha256=sha256)
    return caught.value.reason


def forged(change: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> bytes:
    """A file with changed content and a content hash that fits it: what a hostile writer can do."""
    payload = to_bytes(small_parameters())
    tensors = safetensors.torch.load(payload)
    length = int.from_bytes(payload[:8], "little")
    metadata = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["innerloop"])
    change(tensors, metadata)
    metadata["content_sha256"] = "0" * 64
    made: bytes = safetensors.torch.save(tensors, {"innerloop": json.dumps(metadata, separators=(",", ":"))})
    return made.replace(b"0" * 64, hashlib.sha256(made).hexdigest().encode(), 1)


def test_parameters_come_back_bit_for_bit() -> None:
    parameters = small_parameters()
    payload = to_bytes(parameters)
    assert_equal(from_bytes(payload, sha256=hashlib.sha256(payload).hexdigest()), parameters)


def test_a_model_without_items_comes_back() -> None:
    empty = {
        "item_ids": (),
        "item_out": torch.zeros(0, D),
        "item_in": torch.zeros(0, P, D),
        "item_spread": torch.zeros(0, P),
        "neighbour_items": torch.zeros(0, M, dtype=torch.int64),
        "neighbour_values": torch.zeros(0, M, P),
        "pair_counts": torch.zeros(0, M, 1),
        "pair_means": torch.zeros(0, 1),
        "item_users": torch.zeros(0),
        "item_factors": torch.zeros(0, F),
        "item_events": torch.zeros(0),
        "item_bias": torch.zeros(0),
        "counts": torch.zeros(NUM_BUCKETS, 0),
    }
    parameters = small_parameters(**empty)
    assert_equal(from_bytes(to_bytes(parameters)), parameters)


def test_views_of_one_tensor_can_be_written() -> None:
    shared = torch.arange(2.0 * F)
    for metric, precision in ((shared[::2], shared[:F]), (shared[:F], shared[:F])):
        parameters = small_parameters(metric=metric, precision=precision)
        assert_equal(from_bytes(to_bytes(parameters)), parameters)


def test_equal_parameters_give_equal_bytes_in_every_process() -> None:
    here = hashlib.sha256(to_bytes(small_parameters())).hexdigest()
    code = (
        "import hashlib, tests.test_checkpoint as t;print(hashlib.sha256(t.to_bytes(t.small_parameters())).hexdigest())"
    )
    for seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        )
        assert there.stdout.strip() == here


def test_the_header_does_not_grow_with_the_catalogue() -> None:
    payload = to_bytes(small_parameters())
    assert b"film-3" not in payload[: 8 + int.from_bytes(payload[:8], "little")]


@pytest.mark.parametrize("kept", [0, 5, 8, 200, -1])
def test_a_truncated_file_is_refused(kept: int) -> None:
    assert refused(to_bytes(small_parameters())[:kept]) in {"TRUNCATED", "HASH_MISMATCH"}


def test_any_flipped_bit_is_refused() -> None:
    payload = to_bytes(small_parameters())
    for position in range(0, len(payload), 7):
        damaged = bytearray(payload)
        damaged[position] ^= 1 << (position % 8)
        refused(bytes(damaged))


def test_appended_bytes_are_refused() -> None:
    assert refused(to_bytes(small_parameters()) + b"\0") == "HASH_MISMATCH"


def test_another_file_than_the_registered_one_is_refused() -> None:
    registered = hashlib.sha256(to_bytes(small_parameters())).hexdigest()
    other = to_bytes(small_parameters(tau=2.0))
    assert refused(other, sha256=registered) == "HASH_MISMATCH"
    from_bytes(other)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_in_disguise_is_never_opened(protocol: int) -> None:
    assert refused(pickle.dumps(_Bomb(), protocol=protocol)) in {"NOT_SAFETENSORS", "ABSURD_HEADER"}


def test_an_archive_is_refused() -> None:
    assert refused(b"PK\x03\x04" + bytes(100)) == "NOT_SAFETENSORS"


@pytest.mark.parametrize("length", [0, MAX_HEADER_BYTES + 1, 2**63])
def test_an_absurd_header_length_is_refused_without_allocating_it(length: int) -> None:
    payload = to_bytes(small_parameters())
    assert refused(length.to_bytes(8, "little") + payload[8:]) == "ABSURD_HEADER"


def test_a_header_length_that_begins_like_a_pickle_is_no_pickle() -> None:
    header = b"{".ljust(0x0580)
    payload = len(header).to_bytes(8, "little") + header
    assert payload.startswith(b"\x80\x05")
    assert refused(payload) == "WRONG_METADATA"


def test_a_deeply_nested_header_is_refused() -> None:
    header = b'{"__metadata__":{"innerloop":"{\\"content_sha256\\":\\"' + b"0" * 64 + b'\\"}"},"x":' + b"[" * 100_000
    payload = len(header).to_bytes(8, "little") + header
    hashed = payload.replace(b"0" * 64, hashlib.sha256(payload).hexdigest().encode())
    assert refused(hashed) == "WRONG_METADATA"


def test_a_safetensors_file_of_somebody_else_is_refused() -> None:
    assert refused(safetensors.torch.save({"weight": torch.zeros(3)})) == "WRONG_METADATA"


def test_a_wrong_shape_is_refused_even_with_a_fitting_hash() -> None:
    def cut(tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
        tensors["item_out"] = tensors["item_out"][:-1].clone()

    def flatten(tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
        tensors["text_map"] = torch.tensor(1.0)

    assert refused(forged(cut)) == "WRONG_SHAPE"
    assert refused(forged(flatten)) == "WRONG_SHAPE"


def test_a_neighbour_outside_the_catalogue_is_refused() -> None:
    def point_outside(tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
        tensors["neighbour_items"][0, 0] = N

    assert refused(forged(point_outside)) == "WRONG_SHAPE"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_neither_read_nor_written(value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
        tensors["metric"][1] = value

    assert refused(forged(poison)) == "NON_FINITE"
    metric = torch.ones(F)
    metric[1] = value
    with pytest.raises(ArtefactRefused, match="NON_FINITE: metric"):
        to_bytes(small_parameters(metric=metric))
    with pytest.raises(ArtefactRefused, match="NON_FINITE: tau"):
        to_bytes(small_parameters(tau=value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tau", float("nan")),
        ("tau", "1"),
        ("support_size", True),
        ("use_inner_step", 1),
        ("parts", "near"),
        ("step", 1),
    ],
)
def test_metadata_of_another_type_is_refused(name: str, value: object) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
        metadata[name] = value

    assert refused(forged(change)) in {"WRONG_METADATA", "NON_FINITE", "WRONG_SHAPE"}


@pytest.mark.parametrize("ids", [b"b\na\nc\nd\ne\nf\ng", b"a\na\nc\nd\ne\nf\ng", b"\xff\n", b"a\n\nc\nd\ne\nf\ng"])
def test_item_ids_that_are_not_ascending_ids_are_refused(ids: bytes) -> None:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> None:
        tensors["item_ids"] = torch.frombuffer(bytearray(ids), dtype=torch.uint8)

    assert refused(forged(change)) in {"WRONG_METADATA", "WRONG_SHAPE"}


def test_every_reason_is_documented() -> None:
    documented = set(re.findall(r"[A-Z]+_?[A-Z]+", (ArtefactRefused.__doc__ or "").split("Reasons:")[1]))
    assert {"TRUNCATED", "HASH_MISMATCH", "NON_FINITE"} <= documented
    assert len(documented) == 7


def test_the_parameters_of_the_test_use_every_field() -> None:
    assert {f.name for f in dataclasses.fields(MetaParameters)} >= {"item_ids", "counts"}
    assert set(small_parameters().tensors()) == set(safetensors.torch.load(to_bytes(small_parameters()))) - {"item_ids"}
