"""BitLinear of the Scalable MatMul-free LM (arXiv 2406.02528): BitNet b1.58's matrix and activations, and a gain.

Every linear layer normalises its own input with a gain of its own; the norms before mixer and MLP stay. Weights and
activations are rounded as in `bitnet158`.
"""

from dataclasses import dataclass, replace
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectra_jax.sharding import gathered, in_mesh
from spectra_jax.weights.bitnet158 import BitNet158, quantize_tokens, rms_normalise
from spectra_jax.weights.form import Form, bits_of, form, static
from spectra_jax.weights.frozen import Frozen
from spectra_jax.weights.rule import Rule


@no_type_check  # as a pytree it also carries stacked layers, shapes, shardings: whatever a tree.map returns
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gained:
    """What is trained: a matrix, and the gain of the norm on its input."""

    w: Float[Array, "*L m n"]
    gain: Float[Array, "*L m"]


@no_type_check  # as above
@form
class Normalised(Form):
    """A stored matrix whose input is normalised, multiplied by a gain and rounded to 8 bits per token."""

    matrix: Form
    gain: Float[Array, "*L m"]
    eps: float = static()  # as in `BitNet158`
    norm_eps: float = static()

    def activation(self, x):
        """As in training."""
        return rounded(x, self.gain, self.eps, self.norm_eps)

    @property
    def core(self):
        """The matrix."""
        return self.matrix

    def with_core(self, core):
        """The same input for another form of the matrix."""
        return replace(self, matrix=core)

    def dequantize(self):
        """The effective matrix in float32."""
        return self.matrix.dequantize()

    def product(self, x, spec=None):
        """That of the matrix."""
        return self.matrix.product(x, spec)

    @property
    def weights(self):
        """Those of the matrix."""
        return self.matrix.weights

    def stored_bits(self):
        """The matrix's, and the gain."""
        return self.matrix.stored_bits() + bits_of(self.gain)

    def paper_bits(self):
        """Gains are not counted."""
        return self.matrix.paper_bits()


class BitLinear(Rule):
    """Y = A8(RMS(X) gain) T(W), straight through both roundings: A8 to 255 levels per token, T to -1, 0, 1.

    The gain, which begins at 1, has the gradient that flows through A8 as if nothing had been rounded.
    """

    name = "bitlinear"
    paper_bits = 1.58
    gathers = False

    # Its class says 1e-8, but the fused layer that trained the published models never passes that on.
    ternary = BitNet158(eps=1e-5, norm_eps=1e-6)

    def latent(self, w, shards):
        """The matrix, and a gain of ones."""
        return Gained(w, jnp.ones((w.shape[0],), jnp.float32))

    def matrix(self, w):
        """Without the gain."""
        return w.w

    def with_matrix(self, w, matrix):
        """With the same gain."""
        return replace(w, w=matrix)

    def learned(self, m, n):
        """A gain for each input."""
        return m

    def statistics(self, ws, shards):
        """BitNet's."""
        return self.ternary.statistics([w.w for w in ws], shards)

    def codes(self, w, statistics, shards):
        """BitNet's."""
        return self.ternary.codes(w.w, statistics, shards)

    def freeze(self, w, statistics, shards):
        """Codes, scales and the gain."""
        frozen: Frozen = self.ternary.freeze(w.w, statistics, shards)
        return Normalised(frozen, w.gain, self.ternary.eps, self.ternary.norm_eps)

    def effective(self, w, statistics, shards):
        """BitNet's."""
        return self.ternary.effective(w.w, statistics, shards)

    def activation(self, x, w=None):
        """Norm, gain and rounding; of a stored form they are its own."""
        return x if isinstance(w, Form) else rounded(x, w.gain, self.ternary.eps, self.ternary.norm_eps)


def rounded(x: Float[Array, "*B m"], gain: Float[Array, "m"], eps: float, norm_eps: float) -> Float[Array, "*B m"]:
    """x / rms(x) * gain, to 8 bits per token; all of it in float32, in the dtype of x at the end."""
    if in_mesh():
        gain = gathered(gain, jax.P(jax.typeof(x).sharding.spec[-1]))
    normal = rms_normalise(x.astype(jnp.float32), norm_eps)
    return quantize_tokens(normal * gain.reshape(*(x.ndim - 1) * [1], -1), eps).astype(x.dtype)
