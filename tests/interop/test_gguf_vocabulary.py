"""What a tokenizer.json becomes in a GGUF file, and which has no place there (llama.cpp reads it elsewhere)."""

import json

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from spectra_jax.errors import UserError
from spectra_jax.interop.gguf_vocabulary import vocabulary_of


def byte_level(*, split=None, **settings) -> Tokenizer:
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")], **settings))
    made.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|endoftext|>"])
    return made


def test_tokens_that_were_added():
    made = byte_level()
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("  ", normalized=True, special=False)])
    found = vocabulary_of(made.to_str(), 7)
    assert found.tokens == ["a", "b", "ab", "<|endoftext|>", "  ", "[PAD5]", "[PAD6]"]
    assert found.types == [
        *[TokenType.NORMAL] * 3, TokenType.CONTROL, TokenType.USER_DEFINED, *[TokenType.UNUSED] * 2
    ]
    assert (found.pre, found.merges, found.normalises) == ("gpt-2", ["a b"], True)


def test_an_older_file_of_the_same_tokenizer():
    """Without the keys that came later and merges as texts, as GPT-NeoX's file is."""
    spec = json.loads(byte_level().to_str())
    spec["model"] = {key: spec["model"][key] for key in ("type", "vocab")} | {"merges": ["a b"]}
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    assert vocabulary_of(json.dumps(spec), 4) == vocabulary_of(byte_level().to_str(), 4)


def stripping() -> Tokenizer:
    made = byte_level()
    made.add_tokens([AddedToken("[x]", lstrip=True)])
    return made


def lower() -> Tokenizer:
    made = byte_level()
    made.normalizer = normalizers.Lowercase()
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Tokenizer(models.WordLevel({"a": 0}, "a")), "it is WordLevel, not byte-level BPE"),
        (lambda: Tokenizer(models.BPE({"a": 0}, [])), "it has no merges"),
        (lower, "it normalises by Lowercase"),
        (lambda: byte_level(split=pre_tokenizers.ByteLevel(add_prefix_space=True)), "it splits text .ByteLevel. as"),
        (lambda: byte_level(split=pre_tokenizers.Whitespace()), "it splits text .Whitespace. as none of gpt-2, smollm"),
        (lambda: byte_level(ignore_merges=True), "it ignores merges in words that are tokens, and gpt-2 does not"),
        (stripping, r"the tokens \['\[x\]'\] take the spaces around them along"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(made, message):
    with pytest.raises(UserError, match=f"llama.cpp does not have this tokenizer: {message}.*; export with --to=hf"):
        vocabulary_of(made().to_str(), 300)
