"""Meta-parameters ↔ safetensors bytes.  Nothing in a file is executed, and a file is checked before it is read.

Layout: one safetensors file.  Its header carries one metadata entry, `innerloop`: the plain metadata as JSON and a
SHA-256 of all bytes of the file with the hash's own digits set to zero.  The item ids are a tensor of UTF-8 bytes,
one id per line (ids hold no control characters), so that the header stays small however large the catalogue is.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from models.meta_parameters import TENSOR_NAMES, MetaParameters

MAX_HEADER_BYTES = 1 << 20
MAX_ID_BYTES = 128
_ENTRY = "innerloop"
_NO_HASH = "0" * 64
# The metadata entry is JSON inside JSON, hence the backslashes.
_HASH = re.compile(rb'content_sha256\\":\\"([0-9a-f]{64})\\"')
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


class ArtefactRefused(Exception):
    """The bytes are not meta-parameters that may be served: keep the live version and record `reason`.

    Reasons: TRUNCATED, NOT_SAFETENSORS, ABSURD_HEADER, HASH_MISMATCH, WRONG_METADATA, WRONG_SHAPE, NON_FINITE.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def to_bytes(parameters: MetaParameters) -> bytes:
    """Meta-parameters → the bytes of a safetensors file; equal parameters give equal bytes.

    Raises ArtefactRefused where `from_bytes` would: what cannot be read back is not written.
    """
    _check_values(parameters)
    metadata = parameters.metadata()
    ids = "\n".join(metadata.pop("item_ids")).encode()
    # Copies, because safetensors refuses tensors that share memory or are strided.
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in parameters.tensors().items()}
    tensors["item_ids"] = torch.frombuffer(bytearray(ids), dtype=torch.uint8) if ids else torch.empty(0).byte()
    entry = json.dumps({"content_sha256": _NO_HASH, **metadata}, allow_nan=False, separators=(",", ":"))
    payload: bytes = safetensors.torch.save(tensors, {_ENTRY: entry})
    start, end = _hash_span(payload)
    return b"".join((payload[:start], hashlib.sha256(payload).hexdigest().encode(), payload[end:]))


def from_bytes(payload: bytes, *, sha256: str | None = None) -> MetaParameters:
    """The bytes of `to_bytes` → meta-parameters on the CPU.

    `sha256` is the hash of the whole file as it was registered, in hex.  Raises ArtefactRefused, before a tensor is
    made, for bytes that were cut, changed or never were such a file; and for names, shapes or values that do not fit.
    """
    if sha256 is not None and hashlib.sha256(payload).hexdigest() != sha256.lower():
        raise ArtefactRefused("HASH_MISMATCH", "the bytes are not those that were registered")
    _check_envelope(payload)
    _check_content_hash(payload)
    tensors, metadata = _read(payload)
    metadata["item_ids"] = _read_ids(tensors.pop("item_ids", None))
    _check_types(metadata)
    try:
        parameters = MetaParameters.from_parts(tensors, metadata)
    except (ValueError, IndexError) as error:
        raise ArtefactRefused("WRONG_SHAPE", str(error)) from error
    _check_values(parameters)
    return parameters


def _check_envelope(payload: bytes) -> None:
    """Refuse what cannot be a safetensors file, from its first bytes alone."""
    if len(payload) < 10:
        raise ArtefactRefused("TRUNCATED", f"{len(payload)} bytes are no file")
    if payload[8:9] != b"{":
        # Said for the log only: a header length may begin like a pickle, so this decides nothing.
        looks = (
            "looks like a pickle or an archive, which is never opened" if payload.startswith(_PICKLES) else "no header"
        )
        raise ArtefactRefused("NOT_SAFETENSORS", looks)
    length = int.from_bytes(payload[:8], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ArtefactRefused("ABSURD_HEADER", f"a header of {length} bytes (at most {MAX_HEADER_BYTES})")
    if len(payload) < 8 + length:
        raise ArtefactRefused("TRUNCATED", "the file ends within its header")


def _hash_span(payload: bytes) -> tuple[int, int]:
    """Where the digits of the content hash stand."""
    end = 8 + int.from_bytes(payload[:8], "little")
    found = _HASH.search(payload[:end])
    if found is None:
        raise ArtefactRefused("WRONG_METADATA", "no content hash: not written by innerloop")
    return found.span(1)


def _check_content_hash(payload: bytes) -> None:
    start, end = _hash_span(payload)
    view = memoryview(payload)
    digest = hashlib.sha256(view[:start])
    digest.update(_NO_HASH.encode())
    digest.update(view[end:])
    if digest.hexdigest().encode() != payload[start:end]:
        raise ArtefactRefused("HASH_MISMATCH", "bytes were changed or cut off since the file was written")


def _read(payload: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain metadata, as far as they are a well-formed safetensors file."""
    header_end = 8 + int.from_bytes(payload[:8], "little")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(payload)
        entry = json.loads(payload[8:header_end])["__metadata__"][_ENTRY]
        metadata = json.loads(entry, parse_constant=_refuse_constant)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactRefused("WRONG_METADATA", str(error)[:300]) from error
    if not isinstance(metadata, dict):
        raise ArtefactRefused("WRONG_METADATA", "the metadata is not a JSON object")
    metadata.pop("content_sha256", None)
    return tensors, metadata


def _refuse_constant(name: str) -> float:
    raise ArtefactRefused("NON_FINITE", f"{name} in the metadata")


def _read_ids(lines: Tensor | None) -> list[str]:
    if lines is None or lines.dtype != torch.uint8 or lines.dim() != 1:
        raise ArtefactRefused("WRONG_METADATA", "no item ids")
    try:
        text = lines.numpy().tobytes().decode()
    except UnicodeDecodeError as error:
        raise ArtefactRefused("WRONG_METADATA", "the item ids are not UTF-8") from error
    return text.split("\n") if text else []


def _check_types(metadata: Mapping[str, Any]) -> None:
    """Refuse plain values whose JSON type is not the field's (names are `from_parts`' to check)."""
    for name, wanted in get_type_hints(MetaParameters).items():
        if name in TENSOR_NAMES or name not in metadata:
            continue
        value = metadata[name]
        if wanted in (str, int, float, bool):
            # bool is an int to Python, not to a reader of the file; a whole float may be written without a point.
            fits = type(value) is wanted or (wanted is float and type(value) is int)
        else:
            fits = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not fits:
            raise ArtefactRefused("WRONG_METADATA", f"{name} is {type(value).__name__}")


def _check_values(parameters: MetaParameters) -> None:
    """Refuse what is well-formed and still must not be served."""
    for name, tensor in parameters.tensors().items():
        if not bool(torch.isfinite(tensor).all()):
            raise ArtefactRefused("NON_FINITE", f"{name} holds NaN or infinity")
    for name, value in parameters.metadata().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ArtefactRefused("NON_FINITE", f"{name} is {value}")
    _check_ids(parameters.item_ids)
    rows = parameters.neighbour_items
    if rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= len(parameters.item_ids)):
        raise ArtefactRefused("WRONG_SHAPE", "neighbour_items points outside the catalogue")


def _check_ids(item_ids: tuple[str, ...]) -> None:
    """Refuse ids that are not 1 to 128 bytes without a line break, ascending by their bytes."""
    encoded = [i.encode() for i in item_ids]
    if any(not 1 <= len(i) <= MAX_ID_BYTES or b"\n" in i for i in encoded):
        raise ArtefactRefused("WRONG_METADATA", "an item id is empty, too long or holds a line break")
    if any(a >= b for a, b in pairwise(encoded)):
        raise ArtefactRefused("WRONG_METADATA", "the item ids are not ascending")
