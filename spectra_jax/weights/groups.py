"""Runs of neighbouring inputs of one output that share a value (groups), in training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectra_jax.errors import UserError
from spectra_jax.sharding import gathered


def grouped(w: Float[Array, "m n"], group: int) -> Float[Array, "G g n"]:
    """The matrix by groups, on every device; `group` 0 is all inputs.

    Raises:
      UserError: groups do not divide the inputs.
    """
    m, n = w.shape
    size = group or m
    if m % size:
        near = min((g for g in range(1, m + 1) if m % g == 0), key=lambda g: abs(g - size))
        raise UserError(
            f"config.model.weight: group={size} does not divide the {m} inputs of a matrix; use {near}, or 0 for all"
        )
    return gathered(w).reshape(m // size, size, n)


def spread(values: Float[Array, "G n"], inputs: int) -> Float[Array, "m n"]:
    """One value per group and output, as a matrix."""
    return jnp.repeat(values, inputs // values.shape[0], axis=0, total_repeat_length=inputs)


def straight_round(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Rounded, ties to even; the gradient passes unchanged."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def stored_as(x: Float[Array, "*S"], dtype: str) -> Float[Array, "*S"]:
    """As it will be read back when stored in `dtype`; the gradient passes unchanged."""
    return x + jax.lax.stop_gradient(x.astype(dtype).astype(x.dtype) - x)
