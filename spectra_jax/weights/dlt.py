"""TernaryLLM's Dual Learnable Ternarization: codes in {-1, 0, 1}, and a scale and a shift per group that are learned.

arXiv 2406.07177. No code of the paper is public, and its numbers are not known to us: every default here is an
assumption, and all are settings, as in --config.model.weight=dlt:group=64,threshold=0.5,init=absmean.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from spectra_jax.errors import one_of
from spectra_jax.weights.form import Form, bits_of, form
from spectra_jax.weights.groups import grouped, spread, stored_as
from spectra_jax.weights.rule import Rule, Statistics

INITS = ("twn", "absmean")


@no_type_check  # as a pytree it also carries stacked layers, shapes and shardings
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    """What is trained: the latent matrix, and a scale and a shift per group of each output."""

    w: Float[Array, "m n"]
    scale: Float[Array, "G n"]
    shift: Float[Array, "G n"]


@no_type_check
@form
class Shifted(Form):
    """`scale[group] * code + shift[group]`."""

    codes: Int8[Array, "*L m n"]
    scales: Float[Array, "*L G n"]
    shifts: Float[Array, "*L G n"]

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix in float32."""
        scales, shifts = (spread(x.astype(jnp.float32), self.codes.shape[0]) for x in (self.scales, self.shifts))
        return scales * self.codes.astype(jnp.float32) + shifts

    def kinds(self):
        """Two's complement."""
        return {"codes": "int2"}

    def stored_bits(self):
        """Codes at 2 bits, scales and shifts as they are."""
        return 2 * self.weights + bits_of(self.scales, self.shifts)

    def paper_bits(self):
        """1.58 a weight; a scale and a shift per group at 16 bits each."""
        return 1.58 * self.weights + 16 * (self.scales.size + self.shifts.size)


@dataclass(frozen=True)
class DLT(Rule):
    """code = sign(W) where |W| > threshold * mean|W| of its group; W_effective = scale * code + shift."""

    group: int = 128  # inputs that share a scale and a shift; 0: all of an output
    threshold: float = 0.7  # Ternary Weight Networks (arXiv 1605.04711); 0.75 elsewhere; 0.5 is TriLM's rounding
    init: str = "twn"  # of the scale: the mean of the magnitudes beyond the threshold, or "absmean", of all
    # Trained Ternary Quantization (arXiv 1612.01064): dL/dW is that of the effective weight times the scale where the
    # code is not 0, and unchanged elsewhere. False: unchanged everywhere, as of TriLM.
    scaled_gradient: bool = True
    scale_dtype: str = "float16"  # scales and shifts are rounded to it, as they will be stored

    name = "dlt"
    paper_bits = 1.58
    gathers = False

    def latent(self, w, shards):
        """The scale that is best for the first codes ("twn"), and no shift."""
        one_of(self.init, INITS, "config.model.weight=dlt: init")
        size = jnp.abs(grouped(w, self.group))
        mean = jnp.mean(size, axis=1)
        if self.init == "absmean":
            return Scaled(w, mean, jnp.zeros_like(mean))
        beyond = size > self.threshold * mean[:, None]
        scale = jnp.sum(jnp.where(beyond, size, 0.0), axis=1) / jnp.maximum(jnp.sum(beyond, axis=1), 1)
        return Scaled(w, scale, jnp.zeros_like(scale))

    def matrix(self, w):
        """The latent matrix."""
        return w.w

    def with_matrix(self, w, matrix):
        """The same scales and shifts for another matrix."""
        return replace(w, w=matrix)

    def learned(self, m, n):
        """A scale and a shift per group."""
        return 2 * n * (m // (self.group or m))

    def statistics(self, ws, shards):
        """For those who look at training: the mean of the scales."""
        return Statistics(jnp.mean(jnp.stack([jnp.mean(jnp.abs(w.scale)) for w in ws]))[None])

    def codes(self, w, statistics, shards):
        """The sign, or 0 up to and including the threshold."""
        mean = jnp.mean(jnp.abs(grouped(w.w, self.group)), axis=1)
        beyond = jnp.abs(w.w) > self.threshold * spread(mean, w.w.shape[0])
        return jnp.where(beyond, jnp.sign(w.w), 0.0).astype(jnp.int8)

    def effective(self, w, statistics, shards):
        """With gradients to the scale (sum of g * code), the shift (sum of g) and, straight through, the weights."""
        m = w.w.shape[0]
        codes = jax.lax.stop_gradient(self.codes(w, statistics, shards).astype(jnp.float32))
        scale, shift = (spread(stored_as(x, self.scale_dtype), m) for x in (w.scale, w.shift))
        factor = jnp.where(codes == 0, 1.0, jax.lax.stop_gradient(scale)) if self.scaled_gradient else 1.0
        # The last term is 0: only its gradient counts.
        return scale * codes + shift + factor * (w.w - jax.lax.stop_gradient(w.w))

    def freeze(self, w, statistics, shards):
        """Codes, scales and shifts."""
        scales, shifts = w.scale.astype(self.scale_dtype), w.shift.astype(self.scale_dtype)
        return Shifted(self.codes(w, statistics, shards), scales, shifts)
