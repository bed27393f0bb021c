"""BiLLM (arXiv 2402.04291): one sign per weight, two for the inputs that matter most, with free values per block.

Block by block of inputs: how many inputs are salient, and where weights are split into small and large ones, are
found by trying (sections 3.2 and 3.3); the whole block is binarized at once; later blocks make up for its error.

It follows the reference, not the paper, where they differ: the search for salient inputs binarizes the others twice
as well, both searches fit the saliency and not the weights, and quantiles count salient weights as zeros. A weight
that equals the mean of its set takes the upper value; the reference gives it the mean.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from spectra_jax.quantize.hessian import HIGHEST, prepared
from spectra_jax.quantize.sparsegpt import saliency
from spectra_jax.schema import Quantize
from spectra_jax.sharding import gathered
from spectra_jax.weights.tables import Tables

MOST_SALIENT = 49  # inputs of a block
SPLITS = np.linspace(0.1, 0.9, 81)  # quantiles of the saliency that are tried as the border of small and large
SMALL, LARGE, SALIENT = 0, 2, 4  # the first code of each set


def billm(w: Float[Array, "m n"], h: Float[Array, "m m"], q: Quantize, name: str = "matrix") -> Tables:
    """The binarized matrix; `q.block` inputs share values, in `q.scale_dtype`.

    Args:
      w: the weights (in, out), in the dtype that the work is done in.
      h: Hessian of its inputs.
      name: of the matrix, in messages.

    Raises:
      UserError: an unknown saliency, or a Hessian that is not positive definite.
    """
    w, u, _ = prepared(gathered(w), h, q.damp, name)  # the searches add up over all outputs
    return _billm(w, u, q)


@partial(jax.jit, static_argnums=2)
def _billm(w: Float[Array, "m n"], u: Float[Array, "m m"], q: Quantize) -> Tables:
    (m, n), block = w.shape, min(q.block, w.shape[0])
    blocks, places = m // block, jnp.arange(m)[None]

    def one(w: Array, k: Array) -> tuple[Array, tuple[Array, Array]]:
        start = k * block
        v, rows = (jax.lax.dynamic_slice_in_dim(x, start, block) for x in (w, u))
        diagonal = jnp.diagonal(jax.lax.dynamic_slice_in_dim(rows, start, block, 1))
        found = _binarized_block(v, diagonal, q)
        error = (v - found.dequantize()) / diagonal[:, None]
        after = jnp.where(places >= start + block, rows, 0)
        return w - jnp.dot(after.T, error, precision=HIGHEST), (found.codes, found.tables)

    w, (codes, tables) = jax.lax.scan(one, w, jnp.arange(blocks))
    codes, tables = codes.reshape(-1, n), jnp.moveaxis(tables[:, :, 0], 0, 1)
    if m % block:
        rest = _binarized_block(w[blocks * block :], jnp.diagonal(u)[blocks * block :], q)
        codes, tables = jnp.concatenate([codes, rest.codes]), jnp.concatenate([tables, rest.tables], 1)
    return Tables(codes, tables, block, SALIENT)


def _binarized_block(v: Float[Array, "b n"], diagonal: Float[Array, " b"], q: Quantize) -> Tables:
    """One block with the sets that its saliency asks for."""
    target = saliency(v, diagonal, q)
    salient = _salient(target)
    large = _large(target, salient)
    sets = ((~large & ~salient, 1), (large & ~salient, 1), (salient, 2))
    (small_codes, small, _), (large_codes, big, _), (salient_codes, four, _) = (_binarized(v, *s) for s in sets)
    codes = jnp.where(large, LARGE + large_codes, SMALL + small_codes)
    codes = jnp.where(salient, SALIENT + salient_codes, codes)
    tables = jnp.concatenate([small, big, four])[:, None].astype(q.scale_dtype)
    return Tables(codes, tables, v.shape[0], SALIENT)


def _salient(target: Float[Array, "b n"]) -> Bool[Array, "b 1"]:
    """The inputs to binarize twice: the largest sums, as many as make the error smallest."""
    rank = jnp.argsort(jnp.argsort(-jnp.sum(jnp.abs(target), axis=1)))[:, None]

    def error(count: Array) -> Array:
        first = rank < count
        best, others = (_binarized(target, mask, 2)[2] for mask in (first, ~first))
        return jnp.sum((target - jnp.where(first, best, others)) ** 2)

    errors = jax.lax.map(error, 1 + jnp.arange(min(MOST_SALIENT, target.shape[0])))
    return rank <= jnp.argmin(errors)


def _large(target: Float[Array, "b n"], salient: Bool[Array, "b 1"]) -> Bool[Array, "b n"]:
    """Where the magnitude reaches the border that makes the error of the weights that are not salient smallest."""
    magnitude = jnp.abs(target)
    ordered = jnp.sort(jnp.where(salient, 0.0, magnitude).ravel())
    below, share = np.divmod(SPLITS * (ordered.size - 1), 1)  # in the host's float64: it decides between neighbours
    below = below.astype(int)
    low, high = ordered[below], ordered[below + 1]
    borders = low + (high - low) * share.astype(ordered.dtype)

    def error(border: Array) -> Array:
        large = magnitude >= border
        over, under = (_binarized(target, mask & ~salient, 1)[2] for mask in (large, ~large))
        return jnp.sum(jnp.where(salient, 0.0, target - jnp.where(large, over, under)) ** 2)

    return magnitude >= borders[jnp.argmin(jax.lax.map(error, borders))]


def _binarized(
    x: Float[Array, "b n"], mask: Bool[Array, "b n"] | Bool[Array, "b 1"], rounds: int
) -> tuple[UInt8[Array, "b n"], Float[Array, "v n"], Float[Array, "b n"]]:
    """What the mask selects of each output, as mean +- mean distance, then the same of what that leaves.

    Returns:
      Codes, their values (2^rounds, n), and the approximation; the first and the last hold where the mask does.
    """
    count = jnp.maximum(jnp.sum(mask, axis=0, keepdims=True), 1).astype(x.dtype)
    mean_of = lambda y: jnp.sum(jnp.where(mask, y, 0.0), axis=0, keepdims=True) / count  # noqa: E731
    codes, values, near = jnp.zeros(x.shape, jnp.uint8), jnp.zeros((1, x.shape[1]), x.dtype), jnp.zeros_like(x)
    for _ in range(rounds):
        left = x - near
        mean = mean_of(left)
        scale = mean_of(jnp.abs(left - mean))
        up = left >= mean
        codes = 2 * codes + up
        values = jnp.stack([values + mean - scale, values + mean + scale], axis=1).reshape(-1, x.shape[1])
        near = near + mean + jnp.where(up, scale, -scale)
    return codes, values, near
