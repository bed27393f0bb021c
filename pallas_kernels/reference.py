"""What every kernel computes, in plain jnp: the specification that they are held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.packing import Packed


def ternary_matmul(x: Float[Array, "*B m"], weights: Packed) -> Float[Array, "*B n"]:
    """x @ (scale * code) with products and sums in float32; in the dtype of x."""
    y = jnp.einsum(
        "...m,mn->...n", x.astype(jnp.float32), weights.dequantize(), precision=jax.lax.Precision.HIGHEST
    )
    return y.astype(x.dtype)


def digits(x: Float[Array, "M m"]) -> tuple[Array, Array, Array]:
    """Activations as two int8 digits of one step per row: x = step (128 high + low), to 2^-15 of a row's largest.

    Codes of 2 bits leave room for them on int8 hardware: a product of 16-bit activations for two of 8 bits.
    """
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST
    q = jnp.round(x / jnp.where(step > 0, step, 1)).astype(jnp.int32)
    high = (q + 64) >> 7
    return high.astype(jnp.int8), (q - (high << 7)).astype(jnp.int8), step


LARGEST = 127 * 128  # so that the high digit stays within 127
