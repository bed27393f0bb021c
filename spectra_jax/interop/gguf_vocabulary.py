"""A tokenizer.json as a GGUF file holds it.

llama.cpp knows how text is split before byte-pair encoding by a name alone. Where the name is missing or wrong it takes
another split, and where a token's type is missing it does not find the token in a text, both without a word; so every
field is written, and a tokenizer that has no name there is refused. It does not normalise: text that NFC would change
is encoded otherwise than by a tokenizer that normalises, as GPT-NeoX's does.
"""

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from spectra_jax.errors import UserError

# llama.cpp's name of a split -> the split. GPT-NeoX's is GPT-2's; "olmo" and "mpt" are other names of it.
SPLITS: dict[str, list[PreTokenizer]] = {
    "gpt-2": [ByteLevel(add_prefix_space=False)],
    "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        Split(Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ), "isolated"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids."""

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str  # one of SPLITS
    normalises: bool

    def add_to(self, file: GGUFWriter, eod: int) -> None:
        """Writes it; `eod` ends a document, and with it the next one begins."""
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre(self.pre)
        file.add_token_list(self.tokens)
        file.add_token_types(self.types)
        file.add_token_merges(self.merges)
        # Left out, all three would be token 11 or none. No token of its own is put before a text.
        file.add_bos_token_id(eod)
        file.add_eos_token_id(eod)
        file.add_unk_token_id(eod)
        file.add_add_bos_token(False)


def vocabulary_of(content: str, size: int) -> Vocabulary:
    """Takes the text of a tokenizer.json apart, and fills it up to `size` with tokens that no text has.

    Raises:
      UserError: a tokenizer that llama.cpp does not have.
    """
    spec = json.loads(Tokenizer.from_str(content).to_str())  # with all defaults, whichever version wrote it
    model, normalizer = spec["model"], (spec["normalizer"] or {"type": None})["type"]
    added = {token["id"]: token for token in spec["added_tokens"]}
    found, ignores = _steps(spec["pre_tokenizer"]), model.get("ignore_merges", False)
    pre = next((name for name, split in SPLITS.items() if _steps(_state(split)) == found), None)
    stripping = [t["content"] for t in added.values() if not t["special"] and (t["lstrip"] or t["rstrip"])]
    faults = {
        f"it is {model['type']}, not byte-level BPE": model["type"] != "BPE",
        "it has no merges, and llama.cpp loads no such file": not model.get("merges"),
        f"it normalises by {normalizer}": normalizer not in (None, "NFC"),
        f"it splits text ({', '.join(step['type'] for step in found)}) as none of {', '.join(SPLITS)} does": not pre,
        # The one split under which llama.cpp looks a whole word up before it tries merges.
        f"it {'ignores' if ignores else 'applies'} merges in words that are tokens, and {pre} does not":
            ignores != (pre == "llama-bpe"),
        f"the tokens {stripping[:3]} take the spaces around them along": bool(stripping),
    }
    if fault := next((text for text, wrong in faults.items() if wrong), None):
        raise UserError(f"llama.cpp does not have this tokenizer: {fault}; export with --to=hf")
    tokens = [f"[PAD{k}]" for k in range(size)]
    types = [TokenType.UNUSED] * size
    for token, k in model["vocab"].items():
        tokens[k], types[k] = token, TokenType.NORMAL
    for k, token in added.items():
        # Special tokens stand for nothing in a text; the others, such as NeoX's runs of spaces, are found in it.
        tokens[k], types[k] = token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return Vocabulary(tokens, types, [" ".join(pair) for pair in model["merges"]], pre, normalizer is not None)


def _state(split: list[PreTokenizer]) -> dict[str, Any]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = Sequence(split)
    return json.loads(made.to_str())["pre_tokenizer"]


def _steps(split: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A split as its steps one after the other, without what tells only where tokens stood in the text."""
    if split is None:
        return []
    if split["type"] == "Sequence":
        return [step for part in split["pretokenizers"] for step in _steps(part)]
    return [{key: value for key, value in split.items() if key != "trim_offsets"}]
