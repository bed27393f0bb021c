"""The product of a training step with a matrix whose latent weights are spread over devices (FSDP): what crosses.

Of a quantized matrix every device takes the codes of its own part, and only they cross, four to a byte; their scales
are everywhere anyhow. The matrix itself, in bfloat16, would be eight times as much. Of the gradient each device asks
for its own part of the sum over devices: a reduce-scatter, where the compiler has one (`LOG.md`). JAX's own derivative
of a product rounds that to the dtype of the activations before the sum; the one here can leave it in float32.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels import api
from spectra_jax.schema import Model
from spectra_jax.sharding import gathered, in_mesh, parts
from spectra_jax.weights.form import Form, form, static
from spectra_jax.weights.frozen import Frozen, expand
from spectra_jax.weights.rule import Rule, Shards, Statistics

AXIS = "data"
PER_BYTE = 4


@dataclass(frozen=True)
class Gathering:
    """What travels and how, and what the backward pass does without the matrix."""

    codes: bool  # of a quantized matrix, rather than the matrix
    packed: bool  # four to a byte; else as they are
    # Under remat the matrix is there again when the backward pass comes, and would be gathered a third time. Otherwise
    # it is gathered again rather than kept: whole, in every layer.
    keep: bool
    float32: bool  # gradients of weights, from the product on; else as activations are until they have been added up

    @classmethod
    def of(cls, m: Model) -> "Gathering":
        """By `gather`, `remat` and `gradient_dtype`."""
        return cls(m.gather != "matrix", m.gather == "codes", m.remat != "none", m.gradient_dtype == "float32")


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Gathered(Form):
    """A latent matrix and its codes, for one product of a training step. It is never stored.

    Without codes it is the effective matrix, which is gathered as XLA likes.
    """

    latent: Float[Array, "m n"]
    frozen: Frozen | None
    how: Gathering = static()

    @classmethod
    def of(cls, rule: Rule, w: Float[Array, "m n"], statistics: Statistics, shards: Shards, how: Gathering):
        """What `rule.effective` is elsewhere."""
        return cls(w, rule.freeze(jax.lax.stop_gradient(w), statistics, shards), how)

    def product(self, x: Float[Array, "r m"], spec: P | None = None) -> Float[Array, "r n"]:
        """x times the effective matrix; straight through, the gradient of that goes to the latent weights."""
        return _product(self.how, spec, x, self.latent, self.frozen)


def divided(w: Array) -> bool:
    """Whether a matrix is spread over the axis of fully sharded parameters."""
    return in_mesh() and AXIS in jax.typeof(w).sharding.spec and jax.sharding.get_abstract_mesh().shape[AXIS] > 1


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(how: Gathering, spec: P | None, x: Array, latent: Array, frozen: Frozen | None) -> Array:
    return _forward(how, spec, x, latent, frozen)[0]


def _forward(how, spec, x, latent, frozen):
    matrix = _matrix(how.packed, frozen, x.dtype) if frozen else latent.astype(x.dtype)
    y = jnp.einsum("rm,mn->rn", x, matrix, out_sharding=spec)
    return y, (x, latent, frozen, matrix if how.keep or not frozen else None)


def _backward(how, spec, kept, g):
    x, latent, frozen, matrix = kept
    if matrix is None:
        matrix = _matrix(how.packed, frozen, x.dtype)
    dx = jnp.einsum("rn,mn->rm", g, matrix, out_sharding=_where(x))
    wide = jnp.float32 if how.float32 else None
    dw = jnp.einsum("rm,rn->mn", x, g, preferred_element_type=wide, out_sharding=_where(latent)).astype(latent.dtype)
    if frozen:
        no_gradient = np.zeros(frozen.codes.shape, jax.dtypes.float0)  # of whole numbers
        frozen = replace(frozen, codes=no_gradient, scales=jnp.zeros_like(frozen.scales))
    return dx, dw, frozen


def _where(x: Array) -> P | None:
    return jax.typeof(x).sharding.spec if in_mesh() else None


_product.defvjp(_forward, _backward)


def _matrix(packed: bool, frozen: Frozen, dtype: jnp.dtype) -> Float[Array, "m n"]:
    """The effective matrix, no longer divided over the axis.

    Within `shard_map`, where XLA takes no decisions: it would divide the multiplication and gather float32.
    """
    codes, spec = frozen.codes, jax.typeof(frozen.codes).sharding.spec
    whole = P(*(None if axis == AXIS else axis for axis in spec))
    packed = packed and codes.shape[0] % (PER_BYTE * parts(spec[0])) == 0
    if packed:
        codes = jax.shard_map(api.pack, in_specs=spec, out_specs=spec)(codes)
    scale = expand(frozen.scales, frozen.codes.shape, frozen.axis)
    across = P(*(axis if size > 1 else None for axis, size in zip(whole, scale.shape)))

    def local(codes: Array, scale: Array) -> Array:
        codes = api.unpack(codes, PER_BYTE * codes.shape[0]) if packed else codes
        return (codes.astype(jnp.float32) * scale).astype(dtype)  # as `Frozen.dequantize`

    run = jax.shard_map(local, in_specs=(whole, across), out_specs=whole)
    return run(gathered(codes, whole), gathered(scale, across))
