"""Matrices of any levels: `scale[group] * table[code]`, a group being neighbouring inputs of one output (a block).

What bitsandbytes calls block-wise data types (arXiv 2110.02861), NF4 among them, with scales as they are or in 8 bits
themselves (QLoRA's double quantization, arXiv 2305.14314, section 3).
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from spectra_jax.sharding import gathered, in_mesh
from spectra_jax.weights.form import Form, bits_of, form, static
from spectra_jax.weights.grid import per_input

SCALE_BLOCK = 256  # scales that share a scale, in the order of their outputs and, within one, of their groups


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class ByteScales(Form):
    """Scales in 8 bits: `offset + scale[block] * table[code]`, with blocks of `SCALE_BLOCK` scales."""

    codes: UInt8[Array, "*L G n"]
    scales: Float[Array, "*L S"]
    offset: Float[Array, "*L"]
    table: Float[Array, "*L 256"]

    @classmethod
    def of(cls, scales: Float[Array, "G n"], table: Float[Array, "256"]) -> "ByteScales":
        """The nearest that this form can hold."""
        line = gathered(scales.astype(jnp.float32)).T.reshape(-1)
        offset = jnp.mean(line)
        blocks = jnp.pad(line - offset, (0, -line.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
        absmax = jnp.max(jnp.abs(blocks), axis=1)
        codes = nearest_codes(normalised(blocks, absmax[:, None]), table)
        codes = codes.reshape(-1)[: line.size].reshape(scales.shape[::-1]).T
        return cls(codes, absmax, offset, table.astype(jnp.float32))

    def dequantize(self) -> Float[Array, "G n"]:
        """The scales in float32."""
        line = gathered(self.codes).T.reshape(-1)
        each = jnp.repeat(self.scales, SCALE_BLOCK, total_repeat_length=self.scales.size * SCALE_BLOCK)[: line.size]
        return (self.offset + each * looked_up(self.table, line)).reshape(self.codes.shape[::-1]).T

    def stored_bits(self):
        """Codes, their scales, the offset and the table."""
        return bits_of(self.codes, self.scales, self.offset, self.table)

    def paper_bits(self):
        """The table, the same for all, is left out."""
        return bits_of(self.codes, self.scales, self.offset)


@no_type_check  # as above
@form
class Codebook(Form):
    """`bits` wide codes of a table's 2^bits values, which need not be in order."""

    codes: UInt8[Array, "*L m n"]
    scales: Float[Array, "*L G n"] | ByteScales
    table: Float[Array, "*L V"]
    bits: int = static(4)

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix in float32."""
        values = looked_up(self.table, self.codes)
        scales = self.scales.dequantize() if isinstance(self.scales, Form) else self.scales
        return values * per_input(scales, values)

    def kinds(self):
        """Codes are places in the table."""
        return {"codes": f"uint{self.bits}"}

    def stored_bits(self):
        """Codes, scales, and the table once per matrix."""
        inner = self.scales.stored_bits() if isinstance(self.scales, Form) else bits_of(self.scales)
        return self.bits * self.weights + inner + bits_of(self.table)

    def paper_bits(self):
        """QLoRA's count: the tables are left out. 4.5 per weight for blocks of 64 and scales of 32 bits."""
        inner = self.scales.paper_bits() if isinstance(self.scales, Form) else bits_of(self.scales)
        return self.bits * self.weights + inner


def normalised(x: Array, absmax: Array) -> Array:
    """x / absmax in [-1, 1], by way of the reciprocal, as bitsandbytes does it; zeros where absmax is 0."""
    return jnp.clip(x * (1 / jnp.where(absmax == 0, 1, absmax)), -1, 1)


def nearest_codes(x: Float[Array, "..."], table: Float[Array, "V"]) -> UInt8[Array, "..."]:
    """The code of the value nearest to each x; of two as near, the one of the lower value."""
    order = jnp.argsort(table)
    values = table[order]
    # By comparing with every midpoint: a binary search cannot run on spread arrays, and this one is fused.
    place = jnp.searchsorted((values[:-1] + values[1:]) / 2, x, side="left", method="compare_all")
    return looked_up(order.astype(jnp.uint8), place)


def looked_up(table: Array, codes: Array) -> Array:
    """table[code], spread as the codes are."""
    spec = jax.typeof(codes).sharding.spec if in_mesh() else None
    return table.at[codes].get(out_sharding=spec, mode="promise_in_bounds")
