"""What a weight rule is, and the arithmetic that all of them share.

A rule turns a latent matrix W (in, out) into the effective one that the product uses. In training the gradient
passes straight through: dL/dW = dL/dW_effective, with no clip mask and nothing through the scale (Spectra, Table 1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from spectra_jax.sharding import gathered
from spectra_jax.weights.form import Form
from spectra_jax.weights.frozen import Frozen, expand


@dataclass(frozen=True)
class Shards:
    """How a matrix (in, out) is cut for its scales: `count` equal pieces along `axis` (0: in, 1: out).

    Model-parallel training computed a scale per shard (A.4 of the paper): q, k, v, gate and up are cut by
    outputs, o and down by inputs. The count is part of the mathematics and not of the mesh.
    """

    count: int = 1
    axis: int = 1


@no_type_check  # as a pytree it also carries stacked layers, shapes, shardings: whatever a tree.map returns
@dataclass(frozen=True)
class Statistics:
    """What a rule takes from the latent weights: one value per shard. `center` is None where a rule has none."""

    scale: Float[Array, "S"]
    center: Float[Array, "S"] | None = None


# A latent matrix, or a pytree of one with what a rule learns beside it.
Latent = Any


class Rule:
    """A way to represent a matrix. Subclasses are stateless; `statistics` and `codes` are all most need to give."""

    name: str
    #: Bits per weight in the accounting of the Spectra paper ("paper bits").
    paper_bits: float
    #: Bits that a packed code takes.
    code_bits = 2
    #: Whether the product uses codes and scales rather than the latent weight.
    quantized = True
    #: Whether codes may cross between devices in place of the matrix (gather.py): one scale per shard, nothing learned.
    gathers = True
    #: Whether what is trained holds the matrix in its own units, so that it can be looked at, and begun with.
    holds_matrix = True
    #: Whether `activation` normalises its input, which replaces the norms before attention and MLP.
    normalises_input = False

    def statistics(self, ws: Sequence[Float[Array, "m _"]], shards: Shards) -> Statistics:
        """Scales over the given matrices together: one matrix, or q, k and v if they share."""
        raise TypeError(f"weight rule {self.name} has no scales")

    def codes(self, w: Float[Array, "m n"], statistics: Statistics, shards: Shards) -> Int8[Array, "m n"]:
        """The small integers that stand for the weights."""
        raise TypeError(f"weight rule {self.name} has no codes")

    def latent(self, w: Float[Array, "m n"], shards: Shards) -> Latent:
        """What is trained for a matrix that begins as `w`: the matrix, or a pytree of it and of learned values."""
        return w

    def matrix(self, w: Latent) -> Any:
        """The matrix in what is trained, (*L, m, n): an array, also one on the host, or its shape."""
        return w

    def with_matrix(self, w: Latent, matrix: Any) -> Latent:
        """What is trained with another matrix in it."""
        return matrix

    def learned(self, m: int, n: int) -> int:
        """How many values are learned beside a matrix (m, n)."""
        return 0

    def activation(self, x: Float[Array, "*B m"], w: Latent | Form | None = None) -> Float[Array, "*B m"]:
        """What the product does to its input first; `w` for a rule that learns something for that."""
        return x

    def freeze(
        self, w: Float[Array, "m n"], statistics: Statistics, shards: Shards
    ) -> Frozen | Float[Array, "m n"]:
        """The stored form: codes and scales, without the latent weight."""
        codes = self.codes(w, statistics, shards)
        return Frozen(codes, statistics.scale, shards.axis, self.code_bits, self.paper_bits)

    def effective(
        self, w: Float[Array, "m n"], statistics: Statistics | None, shards: Shards
    ) -> Float[Array, "m n"]:
        """The matrix that the product uses, with the straight-through gradient to `w`.

        It is the very expression that `freeze` and `Frozen.dequantize` evaluate, so that both forwards agree.
        """
        frozen = self.freeze(jax.lax.stop_gradient(w), statistics, shards)
        return straight_through(w, frozen.dequantize())


jax.tree_util.register_dataclass(Statistics, data_fields=["scale", "center"], meta_fields=[])


@jax.custom_vjp
def straight_through(w: Float[Array, "*S"], effective: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """`effective` forward, the identity to `w` backward."""
    return effective


def _straight_through_forward(w, effective):
    return effective, None


def _straight_through_backward(_, g):
    return g, jnp.zeros_like(g)


straight_through.defvjp(_straight_through_forward, _straight_through_backward)


def shard_means(
    f: Callable[[Array], Array], ws: Sequence[Float[Array, "m _"]], shards: Shards
) -> Float[Array, "S"]:
    """Mean of `f(w)` over each shard of the given matrices together.

    Each matrix is first reduced to a vector along the cut axis: the vector is small enough to gather, so the cut
    need not agree with how the matrix is spread over devices.
    """
    total = jnp.zeros((), jnp.float32)
    count = 0
    for w in ws:
        line = gathered(jnp.sum(f(w), axis=1 - shards.axis))
        total = total + jnp.sum(line.reshape(shards.count, -1), axis=1)
        count += w.size // shards.count
    return total / count


def along(values: Float[Array, "S"], w: Float[Array, "m n"], shards: Shards) -> Array:
    """One value per shard, repeated and shaped to combine with the matrix."""
    return expand(values, w.shape, shards.axis)
