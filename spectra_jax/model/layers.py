"""The parts of a block: Linear, RMSNorm and rotary embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Real

from spectra_jax.sharding import Rules
from spectra_jax.weights.form import Form
from spectra_jax.weights.frozen import matmul
from spectra_jax.weights.gather import Gathered, Gathering, divided
from spectra_jax.weights.rule import Rule, Shards, Statistics


class Linear(nnx.Module):
    """A matrix (in, out) without bias: latent under a weight rule, or frozen; which one is in the parameters."""

    def __init__(
        self,
        shape: tuple[int, int],
        dims: tuple[str, str],
        rule: Rule,
        shards: Shards,
        rules: Rules,
        *,
        std: float,
        gather: Gathering,
        rngs: nnx.Rngs,
    ):
        """`dims` are the logical dims of `shape`; the latent weight starts normal with deviation `std`."""
        self.rule, self.shards, self.gather = rule, shards, gather
        init = jax.nn.initializers.normal(std)
        w = init(rngs.params(), shape, jnp.float32, out_sharding=rules(*dims))
        self.w = nnx.Param(rule.latent(w, shards))

    def __call__(
        self,
        x: Float[Array, "B T m"],
        out_sharding: PartitionSpec | None,
        statistics: Statistics | None,
    ) -> Float[Array, "B T n"]:
        """x times the effective matrix. `statistics` are those of a latent weight whose rule has scales."""
        w = self.w.get_value()
        x = self.rule.activation(x, w)
        if isinstance(w, Form):
            pass
        elif self.rule.quantized and self.rule.gathers and self.gather.codes and divided(w):
            w = Gathered.of(self.rule, w, statistics, self.shards, self.gather)
        else:
            w = self.rule.effective(w, statistics, self.shards)
            w = Gathered(w, None, self.gather) if self.gather.float32 else w
        return matmul(x, w, out_sharding)


class RMSNorm(nnx.Module):
    """x / rms(x) * gain, statistics in float32, no bias."""

    def __init__(self, D: int, eps: float):
        self.eps = eps
        self.gain = nnx.Param(jnp.ones((D,), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Same shape and dtype as x."""
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.gain[...][None, None]).astype(x.dtype)


def rotary_tables(T: int, H: int, base: float) -> tuple[Float[Array, "T h"], Float[Array, "T h"]]:
    """Cosine and sine of position times frequency for each of the H/2 pairs (RoFormer, arXiv 2104.09864)."""
    return rotary_tables_at(jnp.arange(T, dtype=jnp.float32), H, base)


def rotary_tables_at(positions: Real[Array, "*T"], H: int, base: float) -> tuple[Array, Array]:
    """The same at any positions: two of shape (*T, H/2)."""
    frequency = base ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle = positions.astype(jnp.float32)[..., None] * frequency.reshape(*positions.ndim * [1], -1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T N H"], tables: tuple[Float[Array, "*rows T h"], Float[Array, "*rows T h"]]
) -> Float[Array, "B T N H"]:
    """Rotary embedding in the Llama convention of Hugging Face: dim i is paired with dim i + H/2.

    The tables are those of all rows, or each row's own.
    """
    cos, sin = (t[None, :, None] if t.ndim == 2 else t[:, :, None] for t in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
