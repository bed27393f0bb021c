"""The state of a recurrent mixer in the place of keys and values: of one size, however long the text.

Prompts run through the very recurrence of training. They are padded on the right, and a row's state is the one after
its own last token, so that padding never gets into it.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
from jaxtyping import Array, Float, Int

from spectra_jax.model.mlgru import recurrence
from spectra_jax.model.transformer import Transformer

STORED = ("auto",)  # in float32: a recurrence adds up what rounding takes


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recurrent:
    """What every layer keeps of the tokens so far."""

    layers: tuple[Float[Array, "B D"], ...]


def prefill(
    model: Transformer, tokens: Int[Array, "B P"], lengths: Int[Array, "B"], capacity: int, stored: str = "auto"
) -> tuple[Float[Array, "B P D"], Recurrent]:
    """Runs prompts, padded on the right to P tokens: the states of all their tokens, and what follows begins with.

    Args:
      model: with frozen or float matrices.
      capacity, stored: of the other cache; nothing is to be chosen here.
    """
    layers = []

    def recur(f: Array, i: Array) -> Array:
        h = recurrence(f, i)
        layers.append(jax.vmap(lambda row, n: row[n - 1])(h, lengths))
        return h

    hidden = model.hidden(tokens, recur)
    return hidden, Recurrent(tuple(layers))


def decode(model: Transformer, tokens: Int[Array, "B"], state: Recurrent) -> tuple[Float[Array, "B 1 D"], Recurrent]:
    """Runs the next token of every row: its state before the head, and what is kept with it."""
    old, new = iter(state.layers), []

    def recur(f: Array, i: Array) -> Array:
        h = f[:, 0] * next(old) + i[:, 0]
        new.append(h)
        return h[:, None]

    hidden = model.hidden(tokens[:, None], recur)
    return hidden, Recurrent(tuple(new))
