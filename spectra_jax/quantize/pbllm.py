"""PB-LLM (arXiv 2310.00034): a share of salient weights in 8 bits, the others as signs about a mean.

GPTQ with a choice of two roundings. It follows the reference: which weights are salient, and the mean and scale of
the signs, come from the matrix before any update, by groups of inputs; the threshold is one for all outputs, and
mean and scale run over the whole group with salient weights as zeros; the 8-bit grid is one per output. The reference
measures saliency by `hessian` or `magnitude` (its default); the first is ours. A weight that equals the mean takes the
upper value; the reference gives it the mean.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spectra_jax.quantize import grids
from spectra_jax.quantize.feedback import Ahead, Choice, solve
from spectra_jax.quantize.gptq import as_grid
from spectra_jax.quantize.hessian import prepared
from spectra_jax.quantize.sparsegpt import between_0_and_1, row_levels, saliency
from spectra_jax.schema import Quantize
from spectra_jax.sharding import gathered
from spectra_jax.weights.masked import Masked
from spectra_jax.weights.tables import Tables


def pbllm(w: Float[Array, "m n"], h: Float[Array, "m m"], q: Quantize, name: str = "matrix") -> Masked:
    """The matrix in two parts: `q.salient` of the weights in `q.bits` bits, the rest one bit each.

    Args:
      w: the weights (in, out), in the dtype that the work is done in.
      h: Hessian of its inputs.
      name: of the matrix, in messages.

    Raises:
      UserError: a share that is not between 0 and 1, an unknown saliency, or a Hessian that is not positive definite.
    """
    between_0_and_1(q.salient, "salient", "0.1 is the share behind the paper's 1.7 bits")
    w = gathered(w)  # the weights of all outputs compete
    alive, u, _ = prepared(w, h, q.damp, name, q.block)
    return _pbllm(alive, u, row_levels(w, q), q, w.shape[0])


@partial(jax.jit, static_argnums=(3, 4))
def _pbllm(
    w: Float[Array, "p n"], u: Float[Array, "p p"], levels: grids.Levels, q: Quantize, inputs: int
) -> Masked:
    """The first `inputs` rows; the others are padding."""
    group = min(q.group or inputs, inputs)
    high, means, tables = _parts(w[:inputs], jnp.diagonal(u)[:inputs], q, group)
    padded = jnp.pad(high, ((0, w.shape[0] - inputs), (0, 0)))
    values = tables.astype(w.dtype)

    def choose(state: None, place: Array, row: Array, ahead: Ahead) -> tuple[Array, None]:
        of = place // group
        sign = jnp.where(row >= means[of], values[1, of], values[0, of])
        return jnp.where(padded[place], levels.decode(levels.encode(row[None]))[0], sign), state

    fixed, _ = solve(w, u, Choice(lambda state, *_: state, choose), None, block=q.block, unit=q.block)
    fixed = fixed[:inputs]
    upper = fixed == values[1, jnp.arange(inputs) // group]
    low = Tables(upper.astype(jnp.uint8), tables, group)
    return Masked(high, as_grid(fixed, levels, None, q), low, mask_counted=False)


def _parts(
    w: Float[Array, "m n"], diagonal: Float[Array, " m"], q: Quantize, group: int
) -> tuple[Bool[Array, "m n"], Float[Array, "G n"], Float[Array, "2 G n"]]:
    """What is salient, and the mean and the two values of each group; the last group may be short."""
    scores = jnp.abs(saliency(w, diagonal, q))

    def one(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        w, scores = part
        high = scores > jnp.sort(scores.ravel())[int(scores.size * (1 - q.salient))]
        low = jnp.where(high, 0.0, w)
        mean = jnp.mean(low, axis=0)
        return high, mean, jnp.mean(jnp.abs(low - mean[None]), axis=0)

    m, n = w.shape
    full = m // group * group
    high, mean, scale = jax.lax.map(one, jax.tree.map(lambda x: x[:full].reshape(-1, group, n), (w, scores)))
    high = high.reshape(-1, n)
    if full < m:
        more = one((w[full:], scores[full:]))
        high = jnp.concatenate([high, more[0]])
        mean, scale = (jnp.concatenate([x, y[None]]) for x, y in zip((mean, scale), more[1:]))
    return high, mean, jnp.stack([mean - scale, mean + scale]).astype(q.scale_dtype)
