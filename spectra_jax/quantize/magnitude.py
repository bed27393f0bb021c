"""Pruning by magnitude: the smallest weights become 0, with no look at the text and nothing to make up for it.

A share of each matrix (`sparsity`), or N of every M inputs (`pattern`), as `sparsegpt.py` reads them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectra_jax.quantize.sparsegpt import between_0_and_1, lowest, parse_pattern
from spectra_jax.schema import Quantize
from spectra_jax.sharding import gathered
from spectra_jax.weights.masked import Masked


def magnitude(w: Float[Array, "m n"], h: None, q: Quantize, name: str = "matrix") -> Masked:
    """The pruned matrix, its kept weights as floats in `q.scale_dtype`; exactly int(weights * sparsity) go.

    Raises:
      UserError: a share that is not between 0 and 1, or a pattern that does not divide.
    """
    size, pattern = jnp.abs(w), parse_pattern(q, w.shape[0], name)
    if pattern:
        n, m = pattern
        runs = gathered(size).reshape(-1, m, w.shape[1])
        drop = jax.vmap(partial(lowest, count=n))(runs).reshape(w.shape)
    else:
        share = between_0_and_1(q.sparsity, "sparsity", "0.5 is half of them")
        order = jnp.argsort(gathered(size).ravel())
        drop = jnp.zeros(w.size, bool).at[order[: int(w.size * share)]].set(True).reshape(w.shape)
    fixed = jnp.where(drop, 0, w)
    return Masked(fixed != 0, fixed.astype(q.scale_dtype))
