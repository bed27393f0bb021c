"""From logits to tokens: greedy, or drawn after the filters of transformers, in their order."""

from dataclasses import dataclass, fields
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from spectra_jax.errors import UserError

FEW = 64  # a top_k up to this takes the likeliest by selection and not by sorting the vocabulary


@no_type_check  # as a pytree it also carries tracers
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Numbers, not switches: one program serves them all."""

    temperature: int | float = 0.8  # 0 takes the likeliest token
    top_k: int = 40  # choose among so many; 0 for all
    top_p: int | float = 1.0  # choose among the likeliest that together have so much of the probability
    min_p: int | float = 0.0  # choose among those with so much of the probability of the likeliest
    repetition_penalty: int | float = 1.0  # tokens of prompt and output lose by it (arXiv 1909.05858); 1 for none

    def checked(self) -> "Sampling":
        """Itself, as numbers that JAX takes for the same whatever the user wrote.

        Raises:
          UserError: a number out of its range.
        """
        allowed = {
            "temperature": (0 <= self.temperature < np.inf, "must not be negative; 0 takes the likeliest token"),
            "top_k": (self.top_k >= 0 and self.top_k == int(self.top_k),
                      "must be a whole number that is not negative; 0 chooses among all"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1; 1 chooses among all"),
            "min_p": (0 <= self.min_p <= 1, "must be from 0 to 1; 0 chooses among all"),
            "repetition_penalty": (0 < self.repetition_penalty < np.inf, "must be above 0; 1 changes nothing"),
        }
        for name, (good, rule) in allowed.items():
            if not good:
                raise UserError(f"{name}={getattr(self, name)} {rule}")
        return Sampling(*(
            (np.int32 if f.name == "top_k" else np.float32)(getattr(self, f.name)) for f in fields(self)
        ))


def draw(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], keys: Key[Array, "B"], how: Sampling, vocabulary: int
) -> Int[Array, "B"]:
    """A token per row, below `vocabulary`: the rows of a padded embedding beyond stand for none.

    Args:
      seen: the tokens of prompt and output.
      keys: of the random choice, a row's own, so that it does not depend on the other rows.
    """
    logits = penalised(logits, seen, how.repetition_penalty)
    logits = jnp.where(jnp.arange(logits.shape[1])[None] < vocabulary, logits, -jnp.inf)

    def greedy() -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def among(candidates: int) -> Array:
        values, ids = filtered(logits, how, candidates)
        chosen = jnp.argmax(values + _noise(keys, candidates), axis=-1)
        return jnp.take_along_axis(ids, chosen[:, None], axis=1)[:, 0].astype(jnp.int32)

    def among_all() -> Array:
        values = _above(logits / how.temperature, how)
        return jnp.argmax(values + _noise(keys, logits.shape[1]), axis=-1).astype(jnp.int32)

    few = min(FEW, logits.shape[1])
    sorts = (how.top_k > 0) | (how.top_p < 1)
    kind = jnp.where(how.temperature == 0, 0, jnp.where(~sorts, 1, 2 + ~((how.top_k > 0) & (how.top_k <= few))))
    return jax.lax.switch(kind, [greedy, among_all, lambda: among(few), lambda: among(logits.shape[1])])


def penalised(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | Array) -> Float[Array, "B V"]:
    """Logits of seen tokens divided by the penalty where positive, multiplied where negative."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(
    logits: Float[Array, "B V"], how: Sampling, candidates: int
) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The likeliest tokens in descending order: logits over temperature, -inf for those not to choose among; ids.

    Temperature, then top_k, then top_p among what that left, then min_p, as transformers apply them.

    Args:
      candidates: how many; the whole vocabulary, or at least top_k.
    """
    values, ids = jax.lax.top_k(logits / how.temperature, candidates)
    kept = jnp.where(how.top_k > 0, how.top_k, candidates)
    values = jnp.where(jnp.arange(candidates)[None] < kept, values, -jnp.inf)
    shares = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    values = jnp.where((before < how.top_p) | (how.top_p == 1), values, -jnp.inf)  # rounded, all may come to over 1
    return _above(values, how), ids


def _above(values: Float[Array, "B n"], how: Sampling) -> Float[Array, "B n"]:
    """-inf for those less likely than min_p times the likeliest."""
    return jnp.where(values >= jnp.max(values, axis=-1, keepdims=True) + jnp.log(how.min_p), values, -jnp.inf)


def _noise(keys: Key[Array, "B"], n: int) -> Float[Array, "B n"]:
    """Whose sum with logits is largest where a draw from their softmax falls."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (n,)))(keys)
