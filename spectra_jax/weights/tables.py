"""Matrices of a few free values per run of inputs and output: binarizations that say what each sign stands for."""

from math import ceil, log2
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from spectra_jax.weights.form import Form, bits_of, form, static
from spectra_jax.weights.grid import per_input
from spectra_jax.weights.masked import count


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Tables(Form):
    """`tables[code, input // block, output]`; the last block may be short.

    With a `split`, each input is of one kind for all outputs: its codes are all below `split`, or none is. Then one
    bit per input says which, and a code needs only the bits to tell its own kind's values apart. BiLLM has 4 values
    for the signs of small and large weights, and 4 from `split` = 4 up for two rounds of signs of salient inputs:
    2 bits a weight, 1 an input, and 8 numbers per block and output.
    """

    codes: UInt8[Array, "*L m n"]
    tables: Float[Array, "*L v b n"]
    block: int = static()
    split: int = static(0)

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix in float32."""
        of_input = jnp.arange(self.codes.shape[0]) // self.block
        codes = self.codes.astype(jnp.float32)
        values = [per_input(table, codes, of_input) for table in self.tables]
        return jax.lax.select_n(self.codes.astype(jnp.int32), *values)

    @property
    def bits(self) -> int:
        """Of a packed code."""
        return ceil(log2(max(self.split, self.tables.shape[-3] - self.split)))

    def kinds(self):
        """With a split, a bit more than the account has: the code says the kind of its input as well."""
        return {"codes": f"uint{ceil(log2(self.tables.shape[-3]))}"}

    def stored_bits(self):
        """Codes, the map of inputs where there are two kinds, and the tables."""
        inputs = self.weights // self.codes.shape[-1] if self.split else 0
        return self.bits * self.weights + inputs + bits_of(self.tables)

    def paper_bits(self):
        """Signs alone: one of each weight, and a second of those of salient inputs (BiLLM, section 4)."""
        return self.weights + (count(self.codes >= self.split) if self.split else 0)
