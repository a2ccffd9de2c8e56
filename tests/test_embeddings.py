"""The embedding cache: it saves work, and never changes a result."""

import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.encoder import HashedBagOfWords
from pipeline.embeddings import FILE_NAME, cached_embeddings

TEXTS = [f"film number {i}, a {'comedy' if i % 2 else 'drama'}" for i in range(300)]


class CountingEncoder:
    """Hashed words that remember what they were asked for."""

    def __init__(self, size: int = 32, name: str = "") -> None:
        self.inner = HashedBagOfWords(size)
        self.size = size
        self.name = name or self.inner.name
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return self.inner.encode(texts)


def test_the_rows_are_the_encoders_in_the_order_of_the_texts(tmp_path: Path) -> None:
    texts = [*TEXTS, TEXTS[3], TEXTS[0]]
    encoder = CountingEncoder()
    expected = encoder.inner.encode(texts)
    assert torch.equal(cached_embeddings(encoder, texts, tmp_path), expected)
    assert torch.equal(cached_embeddings(encoder, texts[::-1], tmp_path), expected.flip(0))


def test_a_text_is_encoded_once(tmp_path: Path) -> None:
    cached_embeddings(CountingEncoder(), TEXTS[:200], tmp_path)
    second = CountingEncoder()
    cached_embeddings(second, TEXTS, tmp_path)
    assert sorted(second.asked) == sorted(TEXTS[200:])


def test_another_encoder_does_not_get_these_vectors(tmp_path: Path) -> None:
    cached_embeddings(CountingEncoder(), TEXTS, tmp_path)
    other = CountingEncoder(name="other weights")
    cached_embeddings(other, TEXTS, tmp_path)
    assert sorted(other.asked) == sorted(TEXTS)


def test_progress_counts_only_what_had_to_be_encoded(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cached_embeddings(CountingEncoder(), TEXTS[:50], tmp_path, lambda done, total: seen.append((done, total)))
    cached_embeddings(CountingEncoder(), TEXTS, tmp_path, lambda done, total: seen.append((done, total)))
    cached_embeddings(CountingEncoder(), TEXTS, tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(50, 50), (128, 250), (250, 250)]


def test_no_texts_give_no_rows(tmp_path: Path) -> None:
    assert cached_embeddings(CountingEncoder(), [], tmp_path).shape == (0, 32)


def test_a_text_that_is_not_unicode_is_cached_like_any_other(tmp_path: Path) -> None:
    broken = ["lone \ud800 surrogate", ""]
    first = cached_embeddings(CountingEncoder(), broken, tmp_path)
    second = CountingEncoder()
    assert torch.equal(cached_embeddings(second, broken, tmp_path), first)
    assert second.asked == []


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty", "other table", "zeros inside"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    expected = cached_embeddings(CountingEncoder(), TEXTS, tmp_path)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    if damage == "other table":
        path.unlink()
        with sqlite3.connect(path) as cache:
            cache.execute("CREATE TABLE embeddings (something TEXT)")
        cache.close()
    else:
        middle = len(whole) // 2
        path.write_bytes(
            {
                "garbage": b"not a database " * 1000,
                "cut": whole[:middle],
                "empty": b"",
                "zeros inside": whole[: middle - 9000] + bytes(18_000) + whole[middle + 9000 :],
            }[damage]
        )
    assert torch.equal(cached_embeddings(CountingEncoder(), TEXTS, tmp_path), expected)
    # One more call may be what finds and replaces the damage; from then on the cache works again.
    assert torch.equal(cached_embeddings(CountingEncoder(), TEXTS, tmp_path), expected)
    healed = CountingEncoder()
    assert torch.equal(cached_embeddings(healed, TEXTS, tmp_path), expected)
    assert healed.asked == []


def test_a_changed_vector_is_noticed(tmp_path: Path) -> None:
    expected = cached_embeddings(CountingEncoder(), TEXTS, tmp_path)
    with sqlite3.connect(tmp_path / FILE_NAME) as cache:
        cache.execute("UPDATE embeddings SET vector = zeroblob(128)")
    cache.close()
    assert torch.equal(cached_embeddings(CountingEncoder(), TEXTS, tmp_path), expected)


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    expected = HashedBagOfWords(32).encode(TEXTS)
    assert torch.equal(cached_embeddings(CountingEncoder(), TEXTS, tmp_path / "file" / "cache"), expected)
    (tmp_path / FILE_NAME).mkdir()
    assert torch.equal(cached_embeddings(CountingEncoder(), TEXTS, tmp_path), expected)


def test_two_processes_may_fill_one_cache(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from models.encoder import HashedBagOfWords
from pipeline.embeddings import cached_embeddings
encoder, texts = HashedBagOfWords(32), [f"text {i}" for i in range(2000)]
for _ in range(3):
    assert torch.equal(cached_embeddings(encoder, texts, Path(sys.argv[1])), encoder.encode(texts))
"""
    root = Path(__file__).parents[1]
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    with sqlite3.connect(tmp_path / FILE_NAME) as cache:
        assert cache.execute("SELECT count(*) FROM embeddings").fetchone() == (2000,)
        assert cache.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    cache.close()
    assert not list(tmp_path.glob("*.damaged"))
