"""The two programs of generation, each compiled once for its shapes: reading prompts, and writing some tokens more."""

from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, Key, PyTree, UInt

from spectra_jax.model.parameters import apply
from spectra_jax.model.transformer import Transformer
from spectra_jax.serve import cache as keys_and_values
from spectra_jax.serve import recurrent
from spectra_jax.serve.sampling import Sampling, draw
from spectra_jax.sharding import gathered

CHUNK = 16  # new tokens from one dispatch, at most
# What is kept of the tokens so far, by mixer: modules with `prefill`, `decode` and the kinds that it can be STORED as.
CACHES = {"attention": keys_and_values, "mlgru": recurrent}


@no_type_check  # as a pytree it also carries tracers
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Between two dispatches."""

    cache: PyTree  # of the mixer
    token: Int[Array, "B"]  # the newest, not yet read
    seen: Bool[Array, "B V"]  # the tokens of prompt and output
    keys: Key[Array, "B"]
    drawn: Int[Array, ""]  # new tokens of a row


@partial(jax.jit, static_argnames=("graphdef", "vocabulary", "capacity", "stored"))
def prefill(
    graphdef: nnx.GraphDef, parameters: PyTree, tokens: Int[Array, "B P"], lengths: Int[Array, "B"],
    seen: Bool[Array, "B V"], seeds: UInt[Array, "B"], how: Sampling, *, vocabulary: int, capacity: int, stored: str,
) -> State:
    """Reads prompts, padded on the right, and draws the first new token of each."""
    model = apply(graphdef, parameters)
    states, cache = CACHES[model.m.mixer].prefill(model, tokens, lengths, capacity, stored)
    last = jax.vmap(lambda row, n: row[n - 1])(states, lengths)
    before = State(cache, tokens[:, 0], seen, jax.vmap(jax.random.key)(seeds), jnp.int32(0))
    return _next(model, last[:, None], before, cache, how, vocabulary)


@partial(jax.jit, static_argnames=("graphdef", "vocabulary"), donate_argnames="state")
def decode(
    graphdef: nnx.GraphDef, parameters: PyTree, state: State, done: Bool[Array, "B"], steps: int | Array,
    how: Sampling, eod: int | Array, *, vocabulary: int,
) -> tuple[State, Int[Array, "B n"]]:
    """At most `steps` tokens more; none when every row is done."""
    model = apply(graphdef, parameters)

    def step(carry: tuple) -> tuple:
        i, state, done, tokens = carry
        states, cache = CACHES[model.m.mixer].decode(model, state.token, state.cache)
        state = _next(model, states, state, cache, how, vocabulary)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, state.token[:, None], i, axis=1)
        return i + 1, state, done | (state.token == eod), tokens

    tokens = jnp.full((state.token.shape[0], CHUNK), eod, jnp.int32)
    going = lambda carry: (carry[0] < steps) & ~jnp.all(carry[2])  # noqa: E731
    _, state, _, tokens = jax.lax.while_loop(going, step, (jnp.int32(0), state, done, tokens))
    return state, tokens


def _next(
    model: Transformer, states: Array, state: State, cache: PyTree, how: Sampling, vocabulary: int
) -> State:
    """After the token that follows these states is drawn."""
    logits = gathered(model.logits(states)[:, 0])
    keys = jax.vmap(lambda key: jax.random.fold_in(key, state.drawn))(state.keys)
    token = draw(logits, state.seen, keys, how, vocabulary)
    seen = state.seen | (jnp.arange(logits.shape[1])[None] == token[:, None])
    return State(cache, token, seen, state.keys, state.drawn + 1)
