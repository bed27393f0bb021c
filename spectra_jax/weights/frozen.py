"""The stored form of a ternary or binary matrix, and the one product with any form."""

from typing import no_type_check

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int8

from spectra_jax.weights.form import Form, bits_of, form, static


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Frozen(Form):
    """A matrix as `scale[shard] * code`, with one scale per shard along `axis` (0: in, 1: out)."""

    codes: Int8[Array, "*L m n"]
    scales: Float[Array, "*L S"]
    axis: int = static()
    code_bits: int = static(2)  # of a packed code
    counted_bits: float = static(1.58)  # per weight, in the accounting of the Spectra paper

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix in float32."""
        return self.codes.astype(jnp.float32) * expand(self.scales, self.codes.shape, self.axis)

    def kinds(self):
        """Two's complement, or signs."""
        return {"codes": "sign" if self.code_bits == 1 else f"int{self.code_bits}"}

    def stored_bits(self):
        """Packed codes and the scales."""
        return self.code_bits * self.weights + bits_of(self.scales)

    def paper_bits(self):
        """The scales are not counted."""
        return self.counted_bits * self.weights


def expand(values: Float[Array, "S"], shape: tuple[int, ...], axis: int) -> Array:
    """Repeats one value per shard along `axis` of a matrix of this shape: (m, 1), (1, n), or a scalar for S = 1."""
    shards = values.shape[0]
    if shards == 1:
        return values.reshape(1, 1)
    line = jnp.repeat(values, shape[axis] // shards, total_repeat_length=shape[axis])
    return jnp.expand_dims(line, 1 - axis)


def matmul(
    x: Float[Array, "*B m"], w: Float[Array, "m n"] | Form, out_sharding: PartitionSpec | None = None
) -> Float[Array, "*B n"]:
    """x @ w in the dtype of x, for an array or a stored form. `out_sharding` is where it may communicate."""
    # As one matrix of rows: XLA:CPU is slower at the gradient of a product with two dims of rows.
    spec = None if out_sharding is None else PartitionSpec(out_sharding[0], out_sharding[-1])
    if isinstance(w, Form):
        x = w.activation(x)
        y = w.product(x.reshape(-1, x.shape[-1]), spec)
    else:
        y = jnp.einsum("rm,mn->rn", x.reshape(-1, x.shape[-1]), w.astype(x.dtype), out_sharding=spec)
    return jnp.reshape(y, (*x.shape[:-1], y.shape[1]), out_sharding=out_sharding)
