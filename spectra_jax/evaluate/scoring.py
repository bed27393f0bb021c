"""Log-likelihoods of continuations, many at a time: what perplexities, multiple choice and last words are made of.

A model is causal, so a text that is the beginning of another needs no forward pass of its own: all continuations of
one context that are one token long, and any continuation that begins another, are read off one row.
"""

from collections.abc import Sequence
from functools import partial
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

from spectra_jax.data.tokenizer import Tokenizer
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply
from spectra_jax.serve.load import Loaded

BATCH_TOKENS = 4096  # of one batch on one device, padding included
HEAD_POSITIONS = 64  # per sequence, whose logits exist at a time

Ids = Sequence[int]


class Score(NamedTuple):
    """Sum of the log-probabilities of a continuation in nats, and whether each of its tokens was the likeliest."""

    loglikelihood: float
    greedy: bool


class _Row(NamedTuple):
    """The input of one forward pass, and the pairs whose input begins it: (index, positions before its targets)."""

    tokens: tuple[int, ...]
    pairs: list[int]


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) as token ids, cut where lm-evaluation-harness cuts (`TemplateLM._encode_pair`).

    White space at the end of a context belongs to the continuation, for a tokenizer joins it to the next word. The
    continuation's tokens are those of the whole text after as many as the context alone has. An empty context is the
    end-of-document token.

    Raises:
      UserError: a continuation has no token of its own.
    """
    heads = [context.rstrip() for context, _ in pairs]
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
    encoded = []
    for (context, continuation), head, whole in zip(pairs, tokenizer.encode_batch(heads), wholes):
        head, rest = head.tolist(), whole[len(head) :].tolist()
        if not head:  # where the text names no first token, the end of the document before it is one
            head, rest = ([tokenizer.eod], rest) if rest[:1] != [tokenizer.eod] else (rest[:1], rest[1:])
        if not rest:
            raise UserError(f"the continuation {continuation!r} of {context[-40:]!r} has no token of its own; "
                            "begin it at a word's boundary, or give it more text")
        encoded.append((head, rest))
    return encoded


def score(model: Loaded, pairs: Sequence[tuple[Ids, Ids]]) -> list[Score]:
    """The score of each (context, continuation) of token ids, neither of them empty.

    A pair longer than the context of the model by more than one (the last token is never an input) loses the
    beginning of its context. Logits and log-probabilities are in float32, sums in float64.

    Raises:
      UserError: a continuation is longer than the context of the model, or empty.
    """
    T = model.config.data.T
    if empty := sum(not len(continuation) for _, continuation in pairs):
        raise UserError(f"{empty} of {len(pairs)} continuations have no token of their own: their characters joined "
                        "the context's last token; begin them at a word's boundary")
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > T:
        raise UserError(f"a continuation of {longest:,} tokens does not fit into the model's context of {T:,}; "
                        "shorten it, or measure its perplexity with --texts")
    inputs = [(*context, *continuation)[-T - 1 : -1] for context, continuation in pairs]
    rows, scores = _rows(inputs), [Score(0.0, True)] * len(pairs)
    devices, start = model.mesh.devices.size, 0
    with jax.set_mesh(model.mesh):
        while start < len(rows):
            size = min(rounded(len(rows[start].tokens)), T)
            fitting = devices * min(max(BATCH_TOKENS // size, 1), rounded(-(-len(rows) // devices), 1))
            batch = rows[start : start + fitting]
            ends = [[(len(inputs[i]), pairs[i][1]) for i in row.pairs] for row in batch]
            for row, found in zip(batch, _score_rows(model, batch, ends, (fitting, size))):
                for i, one in zip(row.pairs, found):
                    scores[i] = one
            start += fitting
    return scores


def rounded(n: int, least: int = 16) -> int:
    """The first of `least` times 1, 2, 3, 4, 6, 8, 12, ... that is not below `n`: few shapes to compile."""
    size = least
    while size < n:
        size *= 2
    return size * 3 // 4 if size > 2 * least and n <= size * 3 // 4 else size


def _rows(inputs: Sequence[tuple[int, ...]]) -> list[_Row]:
    """The inputs that begin no other one, longest first, each with those that begin it."""
    rows: list[_Row] = []
    # In descending order, what an input begins comes directly before it.
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        if not rows or rows[-1].tokens[: len(inputs[i])] != inputs[i]:
            rows.append(_Row(inputs[i], []))
        rows[-1].pairs.append(i)
    return sorted(rows, key=lambda row: -len(row.tokens))


def _score_rows(
    model: Loaded, rows: list[_Row], ends: list[list[tuple[int, Ids]]], shape: tuple[int, int]
) -> list[list[Score]]:
    """Scores of the (end in its input, continuation) of each row, from one batch of `shape` (rows, tokens)."""
    count = rounded(max(sum(len(continuation) for _, continuation in one) for one in ends), 8)
    tokens, positions, targets = np.zeros(shape, np.int32), *np.zeros((2, shape[0], count), np.int32)
    for b, (row, one) in enumerate(zip(rows, ends)):
        tokens[b, : len(row.tokens)] = row.tokens
        at = [n for end, continuation in one for n in range(end - len(continuation), end)]
        positions[b, : len(at)] = at
        targets[b, : len(at)] = [token for _, continuation in one for token in continuation]
    spread = NamedSharding(model.mesh, P(("slice", "data"), None))
    placed = (jax.device_put(array, spread) for array in (tokens, positions, targets))
    losses, hits = (np.asarray(x) for x in _losses(model.graphdef, model.parameters, *placed))
    found = []
    for b, one in enumerate(ends):
        stops = np.cumsum([0] + [len(continuation) for _, continuation in one])
        found.append([
            Score(-float(losses[b, i:j].sum(dtype=np.float64)), bool(hits[b, i:j].all()))
            for i, j in zip(stops, stops[1:])
        ])
    return found


@partial(jax.jit, static_argnames="graphdef")
def _losses(
    graphdef: nnx.GraphDef, parameters: PyTree, tokens: Int[Array, "B T"], positions: Int[Array, "B S"],
    targets: Int[Array, "B S"],
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Negative log-likelihoods in nats of targets after the tokens up to `positions`; whether each is the likeliest.

    The logits of at most HEAD_POSITIONS positions of each row exist at a time.
    """
    model = apply(graphdef, parameters)
    rules, (B, S) = model.rules, positions.shape
    states = jax.vmap(lambda row, at: row[at])(model.hidden(tokens), positions)
    head = model.head_matrix().astype(states.dtype)
    size = gcd(S, HEAD_POSITIONS)

    def cut(x: Array) -> Array:
        kept = ("act",) * (x.ndim - 2)
        shape = (B, S // size, size, *x.shape[2:])
        return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=rules("batch", None, None, *kept)), 1, 0)

    def one(_: None, piece: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        x, y = piece
        logits = jnp.einsum(
            "bsd,dv->bsv", x, head, preferred_element_type=jnp.float32, out_sharding=rules("batch", None, "vocab")
        )
        hit = jax.lax.broadcasted_iota(y.dtype, (1, 1, logits.shape[2]), 2) == y[..., None]
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return None, (jax.nn.logsumexp(logits, axis=-1) - picked, picked >= jnp.max(logits, axis=-1))

    _, found = jax.lax.scan(one, None, (cut(states), cut(targets)))
    whole = rules("batch", None)
    losses, hits = (jnp.reshape(jnp.moveaxis(x, 0, 1), (B, S), out_sharding=whole) for x in found)
    return losses, hits
