"""The head in 8 bits, for CPUs: of a packed model it is most of what a step of decoding reads.

A product of 8-bit numbers is four of 2-bit numbers, and so the kernel of ternary matrices computes it:

    code = 64 a + 16 b + 4 c + d + 42,   a, b, c, d from -2 to 1,   code from -128 to 127

with the four planes as neighbouring outputs.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int8, PyTree

from spectra_jax.errors import UserError
from spectra_jax.sharding import gathered
from spectra_jax.weights.form import Form, form, is_form
from spectra_jax.weights.frozen import Frozen
from spectra_jax.weights.prepared import Prepared, prepare

HEADS = ("dense", "int8")
PLACES = np.array([64, 16, 4, 1])
OFFSET = 42  # 2 (16 + 4 + 1)
LARGEST = 127


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Planes(Form):
    """A matrix (m, n) of 8-bit codes with a scale for each output. It is never stored."""

    matrix: Prepared  # (m, 4n)
    scales: Float[Array, "n"]

    def product(self, x: Float[Array, "r m"], spec: P | None = None) -> Float[Array, "r n"]:
        """The weights are off by 1/254 of an output's largest at most, x by 2^-14.9 of a row's largest."""
        y = self.matrix.product(x, spec)
        y = y.reshape(y.shape[0], -1, 4)
        # Term by term: a sum over so short a dim takes XLA:CPU two thirds of the kernel's time.
        y = sum(int(place) * y[..., k] for k, place in enumerate(PLACES))
        return (y + OFFSET * jnp.sum(x, axis=1, keepdims=True)) * self.scales[None]


def in_bytes(parameters: PyTree, *, release: bool = False) -> Planes:
    """The nearest codes of the head; an output's largest magnitude is 127.

    Args:
      release: gives up the memory of the float head, which is gone then.

    Raises:
      UserError: a head that is the embedding too, another device than a CPU, or no compiler.
    """
    if "head" not in parameters:
        raise UserError("this model's head is its embedding, which stays float; leave the head dense")
    head = parameters["head"]
    if is_form(head):
        raise UserError("this model's head is quantized already; leave it dense")
    if jax.default_backend() != "cpu":
        raise UserError("a head in 8 bits is for CPUs; leave it dense on other devices")
    planes, scales = jax.jit(_planes)(gathered(head))
    ready, _ = prepare(Frozen(planes[None], jnp.ones((1, 1)), axis=1), "cpu")  # as a stack of one layer
    if release:
        head.delete()
    return Planes(jax.tree.map(lambda x: x[0], ready), scales)


def _planes(head: Float[Array, "m n"]) -> tuple[Int8[Array, "m p"], Float[Array, "n"]]:
    """Each output's four planes, next to each other, and its scale."""
    scales = jnp.max(jnp.abs(head), axis=0) / LARGEST
    codes = jnp.round(head / jnp.where(scales == 0, 1, scales)[None]).astype(jnp.int32)
    digits = (codes - OFFSET + 2 * PLACES.sum())[..., None] // PLACES.reshape(1, 1, 4) % 4 - 2
    return digits.astype(jnp.int8).reshape(head.shape[0], -1), scales
