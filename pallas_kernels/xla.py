"""The product without a kernel: codes unpacked in the program, then a dot that XLA is good at.

Serves everywhere and everything: any backend, any scales. It is what prefill falls back to where unpacking once costs
less than a kernel gains.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.packing import Packed, expand
from pallas_kernels.reference import digits

LAYOUT = "2bit"
LARGEST_SUM = 65536  # inputs whose products of digits, taken together, fit int32


def convert(weights: Packed) -> Packed:
    """Canonical storage is used as it is."""
    return weights


def codes(weights: Packed) -> Int8[Array, "*L m n"]:
    """The codes."""
    return weights.codes()


def refuses(x: jax.ShapeDtypeStruct, weights: Packed) -> str | None:
    """Never."""
    return None


def matmul(x: Float[Array, "M m"], weights: Packed) -> Float[Array, "M n"]:
    """In the dtype of x, sums in float32; on a CPU by two 8-bit digits of x, to 2^-15 of a row's largest.

    One scale per shard of inputs multiplies x, one per output y, and one per group the matrix.
    """
    g, s = weights.scales.shape[-2:]
    matrix, scale = weights.codes(), expand(weights.scales, weights.m, weights.n)
    if g > 1 and s > 1:
        matrix = matrix.astype(jnp.float32) * scale
    elif g > 1:
        x = (x.astype(jnp.float32) * scale.T).astype(x.dtype)
    if matrix.dtype == jnp.int8 and jax.default_backend() == "cpu" and weights.m <= LARGEST_SUM:
        y = _by_digits(x, matrix)
    else:
        y = jnp.dot(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * scale if g == 1 else y).astype(x.dtype)


def _by_digits(x: Float[Array, "M m"], matrix: Int8[Array, "m n"]) -> Float[Array, "M n"]:
    """XLA:CPU is quick at products of int8 and slow at one row of anything else; fused into one, unpacking is slow."""
    high, low, step = digits(x)
    matrix = jax.lax.optimization_barrier(matrix)
    both = jnp.dot(jnp.concatenate([high, low]), matrix, preferred_element_type=jnp.int32)
    return (128 * both[: x.shape[0]] + both[x.shape[0] :]).astype(jnp.float32) * step
