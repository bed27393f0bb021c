"""Pieces of text against the text of all tokens at once, for any cuts of characters and stop strings."""

import pytest
import tokenizers as library
from helpers import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.serve.text import Pieces, Row

BPE = tokenizers.train(texts(20), 300)  # characters that its texts do not have are several tokens
ALPHABET = "aw the,é€漢🐋\n\ufffd"
some_text = st.text(ALPHABET, max_size=40)
something = some_text | st.lists(st.integers(1, 294), max_size=60)  # also tokens of bytes that no text has


def encoded(text: str | list[int]) -> list[int]:
    """Its tokens."""
    return text if isinstance(text, list) else BPE.encode_batch([text])[0].tolist()


@settings(max_examples=200, deadline=None)
@given(some_text, something)
def test_pieces_are_the_text(before, written):
    """Whatever came before; characters in several tokens come whole, and what is given out never changes."""
    pieces, said, tokens = Pieces(BPE, encoded(before + "w")), "", encoded(written)
    for n, token in enumerate(tokens, 1):
        said += pieces.push(token)
        now = BPE.decode(tokens[:n])
        assert now.startswith(said) and len(now) - len(said) <= now.endswith("\ufffd")
    assert said + pieces.rest() == BPE.decode(tokens) and pieces.rest() == ""


@settings(max_examples=200, deadline=None)
@given(something, st.lists(st.text(ALPHABET, max_size=4), max_size=3), st.integers(1, 60))
def test_a_row_ends_before_the_first_stop_string(written, stop, room):
    """Or after so many tokens; nothing that it says is taken back, and it holds no more back than it must."""
    row, said, tokens = Row(BPE, encoded("the"), room, stop), [""], encoded(written)
    for token in tokens:
        row.push(token)
        assert row.text.startswith(said[-1])
        said.append(row.text)
    for n in range(min(len(tokens), room) + 1):
        text = BPE.decode(tokens[:n])
        text = text if n == room else text.removesuffix("\ufffd")
        cuts = [text.find(one) for one in stop if one and one in text]
        if cuts:
            assert (row.text, row.reason, row.tokens) == (text[: min(cuts)], "stop", tokens[:n])
            return
        possible = {len(text) - k for one in stop for k in range(1, len(one)) if text.endswith(one[:k])}
        assert n == room or said[n] == text[: min(possible, default=len(text))]
    if len(tokens) >= room:
        assert (row.text, row.reason, row.tokens) == (BPE.decode(tokens[:room]), "length", tokens[:room])
    else:
        assert row.reason is None and row.tokens == tokens


def test_the_end_of_a_document():
    """It is no token of the row, and lets go of what was held back."""
    row = Row(BPE, encoded("the"), 50, ["whale?"])
    for token in [*encoded(" whale"), encoded("漢")[0], BPE.eod, *encoded(" never")]:
        row.push(token)
    assert (row.text, row.reason) == (" whale\ufffd", "end") and row.tokens == [*encoded(" whale"), encoded("漢")[0]]


def test_a_stop_string_may_be_completed_by_the_last_character():
    row = Row(BPE, encoded("the"), 3, ["\ufffd"])
    for token in [*encoded("a"), *encoded("漢")[:2]]:
        row.push(token)
    assert (row.text, row.reason) == ("a", "stop")


def test_tokens_are_decoded_behind_those_before_them():
    """A tokenizer of words that begin with their space drops the first one's; the prompt's end must keep it."""
    words = {"▁the": 0, "▁whale": 1, "s": 2, "</s>": 3}
    content = library.Tokenizer(library.models.BPE(words, []))
    content.decoder = library.decoders.Metaspace()
    theirs = tokenizers.Tokenizer(content.to_str(), eod="</s>")
    assert theirs.decode([1]) == "whale"
    pieces = Pieces(theirs, [0])
    assert [pieces.push(token) for token in (1, 2, 0)] == [" whale", "s", " the"]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 40])
def test_little_is_decoded_again(n, monkeypatch):
    """However long a text gets, a token costs no more."""
    lengths, decode = [], BPE.decode
    monkeypatch.setattr(BPE, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    pieces = Pieces(BPE, encoded("the whale said" * 9))
    text = "".join(pieces.push(token) for token in encoded(" whale" * n)) + pieces.rest()
    assert text == " whale" * n and max(lengths) <= 17
