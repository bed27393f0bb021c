"""Tokens to text as they come: whole characters only, and nothing of what may turn out to be a stop string."""

from collections.abc import Sequence

from spectra_jax.data.tokenizer import Tokenizer

CONTEXT = 8  # tokens that are decoded again before new ones: twice the bytes of the longest character
BROKEN = "\N{REPLACEMENT CHARACTER}"  # also what the first bytes of a character decode to before its last has come


class Pieces:
    """Text of a growing row of tokens, in pieces that never change afterwards.

    A tokenizer may write a token differently at the beginning of a text, so that new tokens are decoded behind the
    last ones before them.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """`before` are the tokens that the row begins with; their text is not given out."""
        self._decode = tokenizer.decode
        self._ids = [int(token) for token in before[-CONTEXT:]]
        self._given = len(self._decode(self._ids).removesuffix(BROKEN))  # characters of the text of `_ids`

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        text = self._decode(self._ids)
        piece = text.removesuffix(BROKEN)[self._given :]
        self._given += len(piece)
        if len(self._ids) > 2 * CONTEXT:
            open_characters = len(text) - self._given
            self._ids = self._ids[-CONTEXT:]
            self._given = len(self._decode(self._ids)) - open_characters
        return piece

    def rest(self) -> str:
        """The remains of a character that never became whole."""
        piece = self._decode(self._ids)[self._given :]
        self._given += len(piece)
        return piece


class Row:
    """One row of a batch while it is generated."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], room: int, stop: Sequence[str]):
        """`room` is how many tokens may follow; it ends before the first of the strings `stop`."""
        self.tokens: list[int] = []
        self.text = ""  # without the end of it that may begin a stop string, until it is clear that it does not
        self.reason: str | None = None  # "end" of the document, "stop" string, "length"; None while it goes on
        self._pieces = Pieces(tokenizer, prompt)
        self._eod, self._room, self._stop, self._held = tokenizer.eod, room, [s for s in stop if s], ""

    def push(self, token: int) -> None:
        """One more token; nothing happens once there is a reason to end."""
        if self.reason:
            return
        if token == self._eod:
            self._end("end", self._pieces.rest())
            return
        self.tokens.append(token)
        self._add(self._pieces.push(token))
        if self.reason is None and len(self.tokens) == self._room:
            self._end("length", self._pieces.rest())

    def _end(self, reason: str, last: str) -> None:
        self._add(last)
        if self.reason is None:  # the last piece may have completed a stop string
            self.text, self._held, self.reason = self.text + self._held, "", reason

    def _add(self, piece: str) -> None:
        held = self._held + piece
        if cuts := [at for stop in self._stop if (at := held.find(stop)) >= 0]:
            self.text, self._held, self.reason = self.text + held[: min(cuts)], "", "stop"
            return
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self.text, self._held = self.text + held[: len(held) - keep], held[len(held) - keep :]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
