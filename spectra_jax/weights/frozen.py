"""The stored forms of a matrix: codes and scales as pytrees, and the one product with them.

A frozen weight takes the place of the latent array in the parameters; the model's code is the same for both.
"""

from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int8


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["axis"])
@dataclass(frozen=True)
class Frozen:
    """A matrix as `scale[shard] * code`, with one scale per shard along `axis` (0: in, 1: out).

    Leading dims (stacked layers) may stand before all of them.
    """

    codes: Int8[Array, "*L m n"]
    scales: Float[Array, "*L S"]
    axis: int

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix in float32."""
        return self.codes.astype(jnp.float32) * expand(self.scales, self.codes.shape, self.axis)


def expand(values: Float[Array, "S"], shape: tuple[int, ...], axis: int) -> Array:
    """Repeats one value per shard along `axis` of a matrix of this shape: (m, 1), (1, n), or a scalar for S = 1."""
    shards = values.shape[0]
    if shards == 1:
        return values.reshape(1, 1)
    line = jnp.repeat(values, shape[axis] // shards, total_repeat_length=shape[axis])
    return jnp.expand_dims(line, 1 - axis)


def matmul(
    x: Float[Array, "*B m"], w: Float[Array, "m n"] | Frozen, out_sharding: PartitionSpec | None = None
) -> Float[Array, "*B n"]:
    """x @ w in the dtype of x, for an array or a frozen weight. `out_sharding` is where it may communicate."""
    matrix = (w.dequantize() if isinstance(w, Frozen) else w).astype(x.dtype)
    # As one matrix of rows: XLA:CPU is slower at the gradient of a product with two dims of rows.
    spec = None if out_sharding is None else PartitionSpec(out_sharding[0], out_sharding[-1])
    rows = jnp.einsum("rm,mn->rn", x.reshape(-1, x.shape[-1]), matrix, out_sharding=spec)
    return jnp.reshape(rows, (*x.shape[:-1], matrix.shape[1]), out_sharding=out_sharding)
