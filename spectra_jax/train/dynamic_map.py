"""The 8-bit numbers that optimizer states are stored in: dynamic trees (arXiv 2110.02861, section 1.3).

Seven decades up to 1, each with twice as many values as the one below: the middles of equal parts of its upper nine
tenths. Signed: 1, 2, ..., 64 values and as many negative ones. Unsigned: 2, 4, ..., 128. Both with 0 and 1, and so with
256 values, which bitsandbytes has in the same order.
"""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from spectra_jax.weights.codebook import looked_up

FRACTION, LOWEST = 7, 127 - 24  # bits of a float32 that make a bin, and the exponent below which it makes no difference


@dataclass(frozen=True)
class DynamicMap:
    """256 values in rising order, by their code."""

    signed: bool

    def value(self, codes: UInt8[Array, "*S"]) -> Float[Array, "*S"]:
        """What codes stand for, by arithmetic: TPUs are slow at looking things up."""
        return self._value(codes.astype(jnp.float32), jnp)

    def _value(self, code: Array | np.ndarray, numpy: ModuleType) -> Array | np.ndarray:
        """The same bits on every device: whole numbers are exact in float32, and the one product is rounded once."""
        q, top = (abs(code - 127), 128) if self.signed else (code + 1, 256)
        n = step = numpy.zeros_like(q)
        # A decade of n values holds q = n to 2n - 1; the middle of part j = q - n of [0.1, 1] is (2n + 9(2j+1)) / 20n.
        for i in range(7):
            size = 2 ** (i if self.signed else i + 1)
            n = numpy.where(q >= size, np.float32(size), n)
            step = numpy.where(q >= size, np.float32(10.0 ** (i - 6) / (20 * size)), step)
        size = numpy.where(q == top, np.float32(1), (18 * q - 16 * n + 9) * step)
        return numpy.where(code < 127, -size, size) if self.signed else size

    def nearest(self, x: Float[Array, "*S"]) -> UInt8[Array, "*S"]:
        """The codes of the values nearest to x in [-1, 1]; of two as near, the lower.

        TPUs compare with all thresholds, a quarter of a cycle for a number by libtpu's estimate; a search by halves
        looks things up at every step. Other devices look up two.
        """
        return jax.lax.platform_dependent(x, tpu=self.compared, default=self.binned)

    def compared(self, x: Float[Array, "*S"]) -> UInt8[Array, "*S"]:
        """`nearest`, by the number of thresholds below x."""
        code = jnp.zeros_like(x, jnp.int32)
        for threshold in self.thresholds:
            code += x > threshold
        return code.astype(jnp.uint8)

    def binned(self, x: Float[Array, "*S"]) -> UInt8[Array, "*S"]:
        """`nearest`, by the first bits of x, which leave one threshold to compare with."""
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        half = self.bins.size // 2
        place = jnp.clip(((bits & 0x7FFFFFFF) >> (23 - FRACTION)) - (LOWEST << FRACTION), 0, half - 1)
        code = looked_up(jnp.asarray(self.bins), place + jnp.where(bits < 0, half, 0))
        above = x > looked_up(jnp.asarray(self.thresholds), code)
        return code + above.astype(jnp.uint8)

    @cached_property
    def values(self) -> Float[np.ndarray, "256"]:
        """All of them."""
        return self._value(np.arange(256, dtype=np.float32), np)

    @cached_property
    def thresholds(self) -> Float[np.ndarray, "255"]:
        """The largest float32 at or below each midpoint: what is above it is nearer to the value above."""
        values = self.values.astype(np.float64)
        exact = (values[:-1] + values[1:]) / 2
        rounded = exact.astype(np.float32)
        return np.where(rounded > exact, np.nextafter(rounded, np.float32(-2)), rounded)

    @cached_property
    def bins(self) -> UInt8[np.ndarray, "n"]:
        """How many thresholds are below all numbers that begin with the same bits, those with a minus after the rest.

        FRACTION is such that no more than one threshold lies among them.
        """
        first = np.arange(LOWEST << FRACTION, (127 << FRACTION) + 1, dtype=np.int32) << (23 - FRACTION)
        low, high = first.view(np.float32), (first + (1 << (23 - FRACTION)) - 1).view(np.float32)
        low = np.where(first == first[0], np.float32(0), low)
        # No more than 254: the last threshold is compared with.
        return np.minimum(np.searchsorted(self.thresholds, [low, -high]), 254).astype(np.uint8).ravel()


SIGNED, UNSIGNED = DynamicMap(signed=True), DynamicMap(signed=False)
