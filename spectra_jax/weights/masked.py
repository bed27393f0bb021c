"""Matrices in two parts by a map of one bit per weight: a few weights kept well, and the rest kept coarsely or not."""

from typing import no_type_check

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from spectra_jax.weights.form import FLOAT_BITS, Form, form, is_form, static


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Masked(Form):
    """`kept` where the mask is true, elsewhere `rest`, or 0 where there is none.

    Both parts have the shape of the matrix, but each counts and means something at its own weights only. A form that
    is a part says the bits of one of its codes as `bits`.
    """

    mask: Bool[Array, "*L m n"]
    kept: Float[Array, "*L m n"] | Form
    rest: Form | None = None
    mask_counted: bool = static(True)  # in the accounting of the method's paper

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix in float32."""
        kept = self.kept.dequantize() if is_form(self.kept) else self.kept.astype(jnp.float32)
        return jnp.where(self.mask, kept, 0.0 if self.rest is None else self.rest.dequantize())

    def kinds(self):
        """A bit per weight. The codes of weights that are the other part's are stored all the same."""
        return {"mask": "uint1"}

    @property
    def weights(self):
        """Weights of both parts."""
        return self.mask.size

    def stored_bits(self):
        """The mask; the codes or floats of each part's own weights; whatever else the parts hold."""
        kept = count(self.mask)
        bits = self.weights
        bits += _own(self.kept, self.kept.stored_bits(), kept) if is_form(self.kept) else _width(self.kept) * kept
        return bits + (0 if self.rest is None else _own(self.rest, self.rest.stored_bits(), self.weights - kept))

    def paper_bits(self):
        """The same with the parts counted as their papers do, and the mask only where they count it."""
        kept = count(self.mask)
        bits = self.weights * self.mask_counted
        bits += _own(self.kept, self.kept.paper_bits(), kept) if is_form(self.kept) else FLOAT_BITS * kept
        return bits + (0 if self.rest is None else _own(self.rest, self.rest.paper_bits(), self.weights - kept))


def count(mask: Bool[Array, "*L m n"]) -> int:
    """How many are true, also where they are too many for an int32: the last sum is the host's."""
    return int(np.sum(np.asarray(jnp.sum(mask, axis=-2)), dtype=np.int64))


def _own(part: Form, bits: int | float, weights: int) -> int | float:
    """Of the bits of a whole part, those that stay when it has codes for so many weights only."""
    return bits - part.bits * (part.weights - weights)


def _width(array: Array) -> int:
    return array.dtype.itemsize * 8
