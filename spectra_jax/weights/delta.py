"""A matrix as that of another model and what was added to it: a compressed delta between two checkpoints.

Factors of low rank in bands of different widths (Delta-CoMe, arXiv 2406.08903) are one `Delta` around the other; signs
with one scale (BitDelta, arXiv 2402.10193) are a `Delta` around the base with a `Frozen` part.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectra_jax.sharding import gathered, in_mesh
from spectra_jax.weights.form import FLOAT_BITS, Form, bits_of, form, is_form


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class LowRank(Form):
    """`(down * values) @ up`: two factors, each floats or a form whose codes have `bits`, and r singular values.

    Of the published U S V^T of a matrix (out, in), `down` is V (in, r) and `up` is U^T (r, out).
    """

    down: Float[Array, "*L m r"] | Form
    values: Float[Array, "*L r"]
    up: Float[Array, "*L r n"] | Form

    def dequantize(self) -> Float[Array, "m n"]:
        """The product in float32, on every device."""
        down, up = gathered(dense(self.down)), gathered(dense(self.up))
        return jnp.dot(down * self.values[None], up, precision=jax.lax.Precision.HIGHEST)

    @property
    def weights(self):
        """Of the matrix, not of its factors."""
        return _size(self.down) * _size(self.up) // (self.values.size * self.values.shape[-1])

    def stored_bits(self):
        """Both factors and the singular values."""
        return _stored(self.down) + _stored(self.up) + bits_of(self.values)

    def paper_bits(self):
        """Codes alone: that is how the paper comes to 1 bit per weight."""
        return sum((f.bits if is_form(f) else FLOAT_BITS) * _size(f) for f in (self.down, self.up))


@no_type_check  # as above
@form
class Delta(Form):
    """`base + part`; the base is the other model's matrix as floats, or another `Delta`."""

    base: Float[Array, "*L m n"] | Form
    part: Form

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix in float32."""
        base = dense(self.base)
        return base + gathered(self.part.dequantize(), jax.typeof(base).sharding.spec if in_mesh() else None)

    @property
    def weights(self):
        """Those of the base."""
        return _size(self.base)

    def stored_bits(self):
        """All that is needed to run it: the delta, and the base, which other deltas may share."""
        return _stored(self.base) + self.part.stored_bits()

    @property
    def delta_bits(self):
        """Those of `stored_bits` that are not the base's."""
        return self.part.stored_bits() + (self.base.delta_bits if is_form(self.base) else 0)

    def paper_bits(self):
        """The delta's alone: the papers count what one more fine-tuned model costs."""
        return self.part.paper_bits() + (self.base.paper_bits() if is_form(self.base) else 0)


def dense(x: Array | Form) -> Float[Array, "m n"]:
    """In float32."""
    return x.dequantize() if is_form(x) else x.astype(jnp.float32)


def _size(x: Array | Form) -> int:
    return x.weights if is_form(x) else x.size


def _stored(x: Array | Form) -> int | float:
    return x.stored_bits() if is_form(x) else bits_of(x)
