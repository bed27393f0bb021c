"""LR-QAT: quantization-aware training of a finished model, in which only low-rank factors and scales are trained.

arXiv 2406.06385: W_effective = s * clip(round(M + alpha/r * B A)), where M = W/s at the start is kept in 8 bits with a
fixed point. Afterwards the codes are an ordinary grid: nothing of the factors is left. Written from the equations; the
paper's numbers are the defaults. As in --config.model.weight=lrqat:bits=3,group=128,rank=32.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from spectra_jax.errors import UserError
from spectra_jax.weights.grid import Grid
from spectra_jax.weights.groups import grouped, spread, stored_as, straight_round
from spectra_jax.weights.rule import Rule, Statistics

MASTER_BITS = 8
SEARCHED, POWER = 100, 4  # ranges i/100 of the largest magnitude, by the sum of |error|^4


@no_type_check  # as a pytree it also carries stacked layers, shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """What is trained: `a`, `b` and `scale`; with rank 0 `master`, which is a float then, and `scale`."""

    master: Int8[Array, "m n"] | Float[Array, "m n"]
    scale: Float[Array, "G n"]
    a: Float[Array, "r n"] | None
    b: Float[Array, "m r"] | None


@dataclass(frozen=True)
class LRQAT(Rule):
    """Symmetric, s = range / (2^(b-1) - 1), codes from -2^(b-1): the grid that `spectra quantize` calls "int"."""

    bits: int = 4
    group: int = 128  # inputs that share a scale; 0: all of an output
    rank: int = 32  # 0: full quantization-aware training, with the master in float32
    alpha: float = 1.0
    scale_dtype: str = "float16"

    name = "lrqat"
    gathers = False
    holds_matrix = False

    @property
    def code_bits(self) -> int:
        """Of a packed code."""
        return self.bits

    @property
    def paper_bits(self) -> float:
        """Scales are not counted."""
        return float(self.bits)

    def latent(self, w, shards):
        """The best ranges; the master; A = 0, and B uniform within 1/sqrt(inputs), by a key made of the matrix."""
        if not 2 <= self.bits < MASTER_BITS or self.rank < 0:
            raise UserError(
                f"config.model.weight=lrqat: bits={self.bits}, rank={self.rank}: from 2 to {MASTER_BITS - 1} bits, and "
                "a rank of at least 0"
            )
        scale = self._searched(grouped(w, self.group))
        start = w / spread(stored_as(scale, self.scale_dtype), w.shape[0])
        if not self.rank:
            return Adapted(start, scale, None, None)
        low, high = self._range
        step = 2.0 ** (MASTER_BITS - self.bits)
        master = jnp.round(jnp.clip(start, low, high) * step)
        key = jax.random.key(jax.lax.bitcast_convert_type(jnp.sum(w), jnp.int32))
        m, n = w.shape
        b = jax.random.uniform(key, (m, self.rank), jnp.float32, -(m**-0.5), m**-0.5)
        return Adapted(jnp.clip(master, -128, 127).astype(jnp.int8), scale, jnp.zeros((self.rank, n)), b)

    def matrix(self, w):
        """The master, in units of its scales."""
        return w.master

    def with_matrix(self, w, matrix):
        """The same scales and factors for another master."""
        return replace(w, master=matrix)

    def learned(self, m, n):
        """A scale per group, and the factors."""
        return n * (m // (self.group or m)) + self.rank * (m + n)

    def statistics(self, ws, shards):
        """For those who look at training: the mean of the scales."""
        return Statistics(jnp.mean(jnp.stack([jnp.mean(jnp.abs(w.scale)) for w in ws]))[None])

    def codes(self, w, statistics, shards):
        """Whole numbers of `bits` bits."""
        return self._codes(w).astype(jnp.int8)

    def effective(self, w, statistics, shards):
        """With gradients to the factors where nothing was clipped, and to the scale: the sum of g * code."""
        return spread(stored_as(w.scale, self.scale_dtype), w.master.shape[0]) * self._codes(w)

    def freeze(self, w, statistics, shards):
        """The grid: master and factors merge into codes."""
        return Grid(self.codes(w, statistics, shards), w.scale.astype(self.scale_dtype), bits=self.bits)

    @property
    def _range(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def _codes(self, w: Adapted) -> Float[Array, "m n"]:
        place = w.master.astype(jnp.float32)
        if self.rank:
            product = jnp.dot(w.b, w.a, precision=jax.lax.Precision.HIGHEST)
            place = place / 2.0 ** (MASTER_BITS - self.bits) + self.alpha / self.rank * product
        rounded, (low, high) = straight_round(place), self._range
        inside = (rounded >= low) & (rounded <= high)
        return jnp.where(inside, rounded, jax.lax.stop_gradient(jnp.clip(rounded, low, high)))

    def _searched(self, w: Float[Array, "G g n"]) -> Float[Array, "G n"]:
        """Of ranges up to the largest magnitude, the one with the smallest sum of |error|^4."""
        low, high = self._range
        largest = jnp.max(jnp.abs(w), axis=1)
        largest = jnp.where(largest == 0, 1.0, largest)

        def scale(share: Array) -> Array:
            return share * largest / high

        def error(share: Array) -> Array:
            s = scale(share)[:, None]
            return jnp.sum(jnp.abs(s * jnp.clip(jnp.round(w / s), low, high) - w) ** POWER, axis=1)

        shares = jnp.arange(1, SEARCHED + 1) / SEARCHED
        return scale(shares[jnp.argmin(jax.lax.map(error, shares), axis=0)])
