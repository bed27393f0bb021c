"""Perplexity of any text by windows that overlap, so that a token late in a document still has context."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import log, nan, sqrt

import numpy as np
from jaxtyping import Float

from spectra_jax.data.tokenizer import Tokenizer
from spectra_jax.errors import UserError
from spectra_jax.evaluate.perplexity import Quality
from spectra_jax.evaluate.scoring import Ids, score
from spectra_jax.serve.load import Loaded


@dataclass(frozen=True)
class TextQuality(Quality):
    """Quality on whole documents; a sequence is a window, and `tokens` counts those predicted."""

    documents: int


def spans(n: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, first, stop) of a document of `n` tokens: from `start` on are read, `first` to `stop` predicted.

    Every token but the first is predicted exactly once. A window reads at most `context` tokens and, after the first
    window, predicts `stride` of them (the last window: what is left), each after at least `context - stride` others.
    With `stride = context` these are the windows of lm-evaluation-harness's rolling log-likelihood.

    Raises:
      UserError: `context` or `stride` out of range.
    """
    if context < 1 or not 1 <= stride <= context:
        raise UserError(f"a context of {context} and a stride of {stride}: a window reads at least 1 token, and "
                        f"advances by 1 to {max(context, 1)} (its context)")
    first, stop = 1, min(n, context + 1)
    while first < stop:
        yield max(0, stop - 1 - context), first, stop
        first, stop = stop, min(n, stop + stride)


def window_pairs(ids: Ids, context: int, stride: int) -> list[tuple[Ids, Ids]]:
    """The (context, continuation) of every window of one document: `scoring.score` predicts the continuations."""
    return [(ids[start:first], ids[first:stop]) for start, first, stop in spans(len(ids), context, stride)]


def evaluate_texts(
    model: Loaded, documents: Iterable[str], *, context: int | None = None, stride: int | None = None
) -> TextQuality:
    """Quality on documents, each by itself.

    No token is added: the first token of a document is context only. Bits per byte count the UTF-8 bytes of the whole
    documents. Errors are standard errors over windows, which for documents shorter than `context` are the documents;
    windows of one document resemble each other, so that for a few long documents the errors are too small.

    Args:
      context: tokens a window reads, at most and by default those of the model (`config.data.T`).
      stride: tokens a window predicts after the first, by default half the context.

    Raises:
      UserError: no token to predict, or `context` or `stride` out of range.
    """
    T = model.config.data.T
    context = T if context is None else context
    if not 1 <= context <= T:
        raise UserError(f"--context={context} is not within 1..{T}, the context of the model; leave it out for {T}")
    stride = max(context // 2, 1) if stride is None else stride
    texts = list(documents)
    pairs = [pair for ids in _encoded(model.tokenizer, texts) for pair in window_pairs(ids, context, stride)]
    if not pairs:
        raise UserError(f"{len(texts)} documents without a token to predict; the first token of each is context only")
    losses = np.array([-found.loglikelihood for found in score(model, pairs)])
    counts = np.array([float(len(continuation)) for _, continuation in pairs])
    loss, error = losses.sum() / counts.sum(), ratio_error(losses, counts)
    per_byte = counts.sum() / sum(len(text.encode()) for text in texts) / log(2)
    return TextQuality(
        float(loss), error, float(loss * per_byte), float(error * per_byte), int(counts.sum()), len(pairs), len(texts)
    )


def ratio_error(sums: Float[np.ndarray, "n"], counts: Float[np.ndarray, "n"]) -> float:
    """Standard error of `sum(sums) / sum(counts)` over n drawn windows; NaN for one (Cochran 1977, equation 6.13)."""
    n = len(sums)
    if n < 2:
        return nan
    residuals = sums - counts * (sums.sum() / counts.sum())
    return sqrt(n / (n - 1) * float(np.square(residuals).sum())) / float(counts.sum())


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    return (ids.tolist() for ids in tokenizer.encode_batch(texts))
