"""What the tests of prepared sets are made from."""

import json
from pathlib import Path

import pytest
from documents import make_texts

from spectra_jax.data import tokenizer as tokenizers


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three sources of 100 documents each, about 110 KB."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(3):
        rows = (json.dumps({"text": text}) + "\n" for text in make_texts(100, n))
        (folder / f"{n}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def fixed(tmp_path: Path) -> str:
    """A tokenizer file: with it parts are made before the last source is read."""
    tokenizers.train(make_texts(50), 300).save(tmp_path / "fixed.json")
    return str(tmp_path / "fixed.json")
