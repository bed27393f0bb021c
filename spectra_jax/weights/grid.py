"""Matrices on a uniform grid: `scale[group] * (code - zero[group])`; a group is a run of inputs of one output."""

from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, UInt8

from spectra_jax.sharding import gathered, in_mesh
from spectra_jax.weights.bitnet158 import quantize_tokens
from spectra_jax.weights.form import Form, bits_of, form, static

PAPER_GROUP_BITS = 32  # per group: the paper's 3.25 and 4.25 bits at groups of 128; 16 for the scale, 16 more


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Grid(Form):
    """`bits` wide codes; signed where there are no zeros, else counted from 0.

    `groups` names the group of each input where a group is not a run of neighbours. With `tokens8` the product rounds
    each token of its input to 8 bits first; with `threshold` as well, all but the input dims in which any token
    reaches it (LLM.int8(), arXiv 2208.07339).
    """

    codes: Int8[Array, "*L m n"] | UInt8[Array, "*L m n"]
    scales: Float[Array, "*L G n"]
    zeros: UInt8[Array, "*L G n"] | None = None
    groups: Int[Array, "*L m"] | None = None
    bits: int = static(8)
    tokens8: bool = static(False)
    threshold: float = static(0.0)

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix in float32."""
        codes = self.codes.astype(jnp.float32)
        if self.zeros is not None:
            codes = codes - per_input(self.zeros, codes, self.groups)
        return codes * per_input(self.scales, codes, self.groups)

    def activation(self, x):
        """Nothing, or 8 bits per token."""
        if not self.tokens8:
            return x
        if not self.threshold:
            return quantize_tokens(x, TINY)
        outlier = jnp.any(jnp.abs(x) >= self.threshold, axis=tuple(range(x.ndim - 1)), keepdims=True)
        return jnp.where(outlier, x, quantize_tokens(jnp.where(outlier, 0.0, x).astype(x.dtype), TINY))

    def kinds(self):
        """Codes are signed where there are no zeros."""
        return {"codes": f"{'u' * (self.zeros is not None)}int{self.bits}", "zeros": f"uint{self.bits}"}

    def stored_bits(self):
        """Codes, scales, zeros at the width of codes, and the map of groups."""
        zeros = 0 if self.zeros is None else self.bits * self.zeros.size
        return self.bits * self.weights + bits_of(self.scales, self.groups) + zeros

    def paper_bits(self):
        """Scales and zeros count where there are groups; one of a whole column does not (Spectra, Table 4)."""
        grouped = self.scales.shape[-2] > 1
        return self.bits * self.weights + grouped * PAPER_GROUP_BITS * self.scales.size


TINY = 1e-8  # a token of zeros stays one


def per_input(values: Array, matrix: Float[Array, "m n"], groups: Int[Array, " m"] | None = None) -> Array:
    """One value per (group, output) as a matrix like this one."""
    values, m = values.astype(jnp.float32), matrix.shape[0]
    spec = jax.typeof(matrix).sharding.spec if in_mesh() else None
    if groups is not None:
        return values.at[groups].get(out_sharding=spec)
    return gathered(jnp.repeat(values, m // values.shape[0], axis=0, total_repeat_length=m), spec)
