"""BitNet b1.58: ternary weights, 8-bit activations, and the norm inside the linear layer.

Follows the public BitLinear reference (see `transformers.integrations.bitnet`, which the tests compare with).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectra_jax.weights.rule import Rule, Statistics, along, shard_means, straight_through


@dataclass(frozen=True)
class BitNet158(Rule):
    """scale = max(mean|W|, eps); code = clip(round(W / scale), -1, 1); input normalised, then 8 bits per token."""

    eps: float = 1e-5  # a lower bound, of the weights' scale and of the activations' largest magnitude
    norm_eps: float = 1e-6  # of the parameterless RMSNorm; the reference's default

    name = "bitnet158"
    paper_bits = 1.58
    normalises_input = True

    def statistics(self, ws, shards):
        """The mean magnitude, bounded from below."""
        return Statistics(jnp.maximum(shard_means(jnp.abs, ws, shards), self.eps))

    def codes(self, w, statistics, shards):
        """Multiplies by the reciprocal of the scale, as the reference does."""
        inverse = 1.0 / along(statistics.scale, w, shards)
        return jnp.clip(jnp.round(w * inverse), -1.0, 1.0).astype(jnp.int8)

    def activation(self, x, w=None):
        """Parameterless RMSNorm, then 8 bits per token with a straight-through gradient."""
        return quantize_tokens(rms_normalise(x, self.norm_eps), self.eps)


def rms_normalise(x: Float[Array, "*B m"], eps: float) -> Float[Array, "*B m"]:
    """x / sqrt(mean(x^2) + eps) over the last dim, statistics in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def quantize_tokens(x: Float[Array, "*B m"], eps: float) -> Float[Array, "*B m"]:
    """Each token (last dim) rounded to 255 levels up to its largest magnitude; the gradient passes unchanged."""
    x32 = x.astype(jnp.float32)
    scale = 127.0 / jnp.maximum(jnp.max(jnp.abs(x32), axis=-1, keepdims=True), eps)
    rounded = (jnp.clip(jnp.round(x32 * scale), -128.0, 127.0) / scale).astype(x.dtype)
    return straight_through(x, jax.lax.stop_gradient(rounded))
