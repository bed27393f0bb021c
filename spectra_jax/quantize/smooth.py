"""8-bit weights and activations: SmoothQuant (arXiv 2211.10438) and LLM.int8() (arXiv 2208.07339).

Activations are rounded to 8 bits per token wherever a matrix reads them. What makes that hard is a few dims of large
magnitude: SmoothQuant moves part of their range into the weights beforehand, LLM.int8() leaves them unrounded.
Weights are rounded to nearest; both papers have the grid `absmax` with 8 bits and one scale for each output.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from spectra_jax.model.matrices import Key
from spectra_jax.model.parameters import with_matrices
from spectra_jax.quantize.blocks import Blocks
from spectra_jax.quantize.grids import group_of
from spectra_jax.quantize.rtn import nearest
from spectra_jax.schema import Quantize
from spectra_jax.sharding import gathered
from spectra_jax.weights.grid import Grid

OUTLIER = 6.0  # LLM.int8(): input dims in which any token reaches it are not rounded
TINY = 1e-5
# Norm -> the matrices that read it.
READERS: dict[str, tuple[Key, ...]] = {
    "attention_norm": (("attention", "q"), ("attention", "k"), ("attention", "v")),
    "mlp_norm": (("mlp", "gate"), ("mlp", "up")),
}


def w8a8(
    w: Float[Array, "m n"], h: Array | None, q: Quantize, name: str = "matrix", *, threshold: float = 0.0
) -> Grid:
    """The quantized matrix (in, out), which rounds its input too; `h` is not looked at.

    Raises:
      UserError: groups that do not divide.
    """
    return nearest(w, q, group_of(w.shape[0], q, name), True, threshold)


def smooth(parameters: PyTree, batches: list[Float[Array, "B T D"]], blocks: Blocks, q: Quantize) -> PyTree:
    """The same block with the range of its activations evened out, as far as norms and the matrices after them go."""
    ranges = None
    for x in batches:
        inputs = jax.block_until_ready(blocks.inputs(parameters, x))
        found = {norm: _range(inputs[keys[0]]) for norm, keys in READERS.items()}
        ranges = found if ranges is None else jax.tree.map(jnp.maximum, ranges, found)
    for norm, keys in READERS.items():
        ws = [parameters[module][name]["w"] for module, name in keys]
        parameters = fold_into_norm(parameters, norm, smoothing(ranges[norm], ws, q.alpha))
    return parameters


@jax.jit
def _range(x: Float[Array, "B T D"]) -> Float[Array, "D"]:
    return gathered(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 1)))


@partial(jax.jit, static_argnums=2)
def smoothing(largest: Float[Array, "D"], ws: list[Float[Array, "D _"]], alpha: float) -> Float[Array, "D"]:
    """What activations are divided by and weights multiplied with: max|x|^alpha / max|W|^(1 - alpha) (equation 4).

    Args:
      largest: magnitude of each input dim.
      ws: all matrices that read it.
      alpha: from 0, activations stay as they are, to 1, weights take over the whole of their range.
    """
    weights = jnp.max(jnp.stack([gathered(jnp.max(jnp.abs(w), axis=1)) for w in ws]), axis=0)
    return jnp.maximum(largest**alpha / jnp.maximum(weights, TINY) ** (1 - alpha), TINY)


def fold_into_norm(parameters: PyTree, norm: str, scales: Float[Array, "D"]) -> PyTree:
    """A block that computes the same, with the output of a norm divided by `scales`."""
    keys = READERS[norm]
    scaled: Mapping[Key, Array] = {
        (module, name): parameters[module][name]["w"] * scales[:, None] for module, name in keys
    }
    return with_matrices(parameters, scaled) | {norm: {"gain": parameters[norm]["gain"] / scales}}
