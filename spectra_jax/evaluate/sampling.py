"""Continuations of many prompts up to given strings, as question-answering tasks want them.

Every new token runs its whole window again, in batches of prompts of about one length: there is no key-value cache.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from spectra_jax.errors import UserError
from spectra_jax.evaluate.scoring import BATCH_TOKENS, Ids, rounded
from spectra_jax.model.parameters import apply
from spectra_jax.serve.load import Loaded
from spectra_jax.sharding import gathered


def complete_until(
    model: Loaded, prompts: Sequence[Ids], until: Sequence[str], *, new_tokens: int, temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What follows each prompt, up to the first of the strings `until`, the end of a document, or `new_tokens`.

    A prompt that leaves no room for the new tokens loses its beginning.

    Args:
      temperature: 0 takes the likeliest token. Choices follow from `seed`, the prompt's index and the position.

    Raises:
      UserError: no room for a prompt, or a negative temperature.
    """
    T = model.config.data.T
    if not 1 <= new_tokens < T:
        raise UserError(f"{new_tokens} new tokens leave no room for a prompt in the model's context of {T}; ask for "
                        f"1 to {T - 1} (max_gen_toks in a task's generation_kwargs)")
    if temperature < 0:
        raise UserError(f"temperature={temperature} must not be negative; 0 takes the likeliest token")
    kept = [list(prompt)[new_tokens - T :] or [model.tokenizer.eod] for prompt in prompts]
    order = sorted(range(len(kept)), key=lambda i: -len(kept[i]))
    found, start, devices = [""] * len(kept), 0, model.mesh.devices.size
    while start < len(order):
        longest = len(kept[order[start]]) + new_tokens
        rows = devices * min(max(BATCH_TOKENS // longest, 1), rounded(-(-len(order) // devices), 1))
        some = order[start : start + rows]
        texts = _complete_batch(
            model, [kept[i] for i in some], some, [stop for stop in until if stop], rows, new_tokens, temperature, seed
        )
        for i, text in zip(some, texts):
            found[i] = text
        start += rows
    return found


def _complete_batch(
    model: Loaded, prompts: list[list[int]], owners: list[int], until: list[str], rows: int, new_tokens: int,
    temperature: float, seed: int,
) -> list[str]:
    spread = NamedSharding(model.mesh, P(("slice", "data"), None))
    texts: list[str | None] = [None] * len(prompts)
    new: list[list[int]] = [[] for _ in prompts]
    numbers = np.array(owners + [0] * (rows - len(owners)), np.int32)
    for _ in range(new_tokens):
        lengths = [len(prompt) + len(more) for prompt, more in zip(prompts, new)]
        tokens = np.zeros((rows, min(rounded(max(lengths)), model.config.data.T)), np.int32)
        for b, (prompt, more) in enumerate(zip(prompts, new)):
            tokens[b, : lengths[b]] = prompt + more
        ends = np.array(lengths + [1] * (rows - len(lengths)), np.int32)
        with jax.set_mesh(model.mesh):
            drawn = np.asarray(_next(
                model.graphdef, model.parameters, jax.device_put(tokens, spread), ends, numbers,
                jax.random.key(seed), temperature, vocabulary=model.tokenizer.vocab_size,
            ))
        for b, more in enumerate(new):
            if texts[b] is None:
                ended = drawn[b] == model.tokenizer.eod
                more += [] if ended else [int(drawn[b])]
                texts[b] = _ended(model.tokenizer.decode(more), until, ended or len(more) == new_tokens)
        if None not in texts:
            break
    return [text or "" for text in texts]


def _ended(text: str, until: list[str], over: bool) -> str | None:
    """The text before the first of `until`; None where there is none and more may come."""
    cuts = [at for stop in until if (at := text.find(stop)) >= 0]
    return text[: min(cuts)] if cuts else text if over else None


@partial(jax.jit, static_argnames=("graphdef", "vocabulary"))
def _next(
    graphdef: nnx.GraphDef, parameters: PyTree, tokens: Int[Array, "B T"], lengths: Int[Array, "B"],
    numbers: Int[Array, "B"], key: Array, temperature: float | Array, *, vocabulary: int,
) -> Int[Array, "B"]:
    """The token after the first `lengths` of each row, likeliest or drawn."""
    model = apply(graphdef, parameters)
    hidden = gathered(model.hidden(tokens))
    states = jax.vmap(lambda row, n: row[n - 1])(hidden, lengths)
    logits = gathered(jnp.dot(
        states, gathered(model.head_matrix()).astype(states.dtype), preferred_element_type=jnp.float32
    ))
    logits = jnp.where(jnp.arange(logits.shape[1])[None] < vocabulary, logits, -jnp.inf)  # padding rows
    keys = jax.vmap(lambda i, n: jax.random.fold_in(jax.random.fold_in(key, i), n))(numbers, lengths)
    drawn = jax.vmap(jax.random.categorical)(keys, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
