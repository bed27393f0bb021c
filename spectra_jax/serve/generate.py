"""Completions by running the whole window for every token: simple, and quick enough at short contexts.

There is no key-value cache yet; the cost of a token grows with the context of the model.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, PyTree

from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply
from spectra_jax.serve.load import Loaded
from spectra_jax.sharding import gathered


def complete(
    model: Loaded, prompt: str, *, new_tokens: int = 64, temperature: float = 0.8, top_k: int = 40, seed: int = 0
) -> str:
    """`prompt` and its continuation, up to the end of a document or `new_tokens`.

    Args:
      model: loaded onto one device: a batch of one prompt cannot be spread.
      temperature: 0 takes the likeliest token.
      top_k: tokens to choose among; 0 for all.

    Raises:
      UserError: an empty prompt or one that leaves no room in the context, or options out of range.
    """
    ids = model.tokenizer.encode_batch([prompt])[0]
    T = model.config.data.T
    if not len(ids):
        raise UserError("the prompt is empty; give at least one character")
    if new_tokens < 1:
        raise UserError(f"{new_tokens} new tokens; ask for at least 1")
    if len(ids) + new_tokens > T:
        raise UserError(
            f"{len(ids)} prompt tokens and {new_tokens} new ones exceed the context of {T}; ask for at most "
            f"{max(T - len(ids), 0)} or shorten the prompt"
        )
    if temperature < 0 or top_k < 0:
        raise UserError(f"temperature={temperature} and top_k={top_k} must not be negative")
    buffer = np.zeros((1, T), np.int32)
    buffer[0, : len(ids)] = ids
    with jax.set_mesh(model.mesh):
        full = _extend(
            model.graphdef, model.parameters, jnp.asarray(buffer), len(ids), jax.random.key(seed), temperature,
            new_tokens=new_tokens, top_k=min(top_k, model.config.model.V), vocabulary=model.tokenizer.vocab_size,
        )
    new = np.asarray(full)[0, len(ids) : len(ids) + new_tokens]
    ends = np.flatnonzero(new == model.tokenizer.eod)
    return prompt + model.tokenizer.decode(new[: ends[0]] if len(ends) else new)


@partial(jax.jit, static_argnames=("graphdef", "new_tokens", "top_k", "vocabulary"))
def _extend(
    graphdef: nnx.GraphDef, parameters: PyTree, buffer: Int[Array, "1 T"], length: int | Array, key: Array,
    temperature: float | Array, *, new_tokens: int, top_k: int, vocabulary: int,
) -> Int[Array, "1 T"]:
    model = apply(graphdef, parameters)
    head = model.head_matrix()

    def step(buffer: Array, i: Array) -> tuple[Array, None]:
        at = length + i
        state = model.hidden(buffer)[0, at - 1]
        logits = gathered(jnp.dot(state, head.astype(state.dtype), preferred_element_type=jnp.float32))
        logits = jnp.where(jnp.arange(logits.shape[0]) < vocabulary, logits, -jnp.inf)  # padding rows
        if top_k:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
        drawn = jax.random.categorical(jax.random.fold_in(key, i), logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits))
        return buffer.at[0, at].set(token.astype(buffer.dtype)), None

    return jax.lax.scan(step, buffer, jnp.arange(new_tokens))[0]
