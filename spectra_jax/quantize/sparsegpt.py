"""SparseGPT (arXiv 2301.00774): weights that matter least become 0, and those not yet passed make up for the error.

A share of all weights (`sparsity`) or N of every M inputs (`pattern`). The kept weights stay floats, or, with
`sparsegpt_quantized`, go to a grid with a zero point per output, fixed by the matrix before any update.

It follows the reference in what the paper leaves open: of each block, everything up to and including the weight at
place `int(weights * sparsity)` goes, over all outputs together; the M inputs are looked at as updated when the first
of them is reached; dead inputs end as zeros.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spectra_jax.errors import UserError, one_of
from spectra_jax.quantize import grids
from spectra_jax.quantize.feedback import STRIP, Ahead, Choice, solve
from spectra_jax.quantize.gptq import as_grid
from spectra_jax.quantize.hessian import prepared
from spectra_jax.schema import Quantize
from spectra_jax.sharding import gathered
from spectra_jax.weights.masked import Masked

Pattern = tuple[int, int]


def sparsegpt(w: Float[Array, "m n"], h: Float[Array, "m m"], q: Quantize, name: str = "matrix") -> Masked:
    """The pruned matrix, its kept weights as floats in `q.scale_dtype`.

    Args:
      w: the weights (in, out), in the dtype that the work is done in.
      h: Hessian of its inputs.
      name: of the matrix, in messages.

    Raises:
      UserError: a share that is not between 0 and 1, a pattern that does not divide, or a Hessian that is not
        positive definite.
    """
    fixed = _pruned(w, h, q, None, name)
    return Masked(fixed != 0, fixed.astype(q.scale_dtype))


def sparsegpt_quantized(w: Float[Array, "m n"], h: Float[Array, "m m"], q: Quantize, name: str = "matrix") -> Masked:
    """The pruned matrix, its kept weights in `q.bits` bits.

    Raises:
      UserError: as `sparsegpt`.
    """
    levels = row_levels(w, q)
    fixed = _pruned(w, h, q, levels, name)
    return Masked(fixed != 0, as_grid(fixed, levels, None, q))


def row_levels(w: Float[Array, "m n"], q: Quantize) -> grids.Levels:
    """Levels with a zero point, one set per output: leaves (1, n)."""
    return grids.fit(w[None], "gptq_asymmetric", q.bits, mse=q.mse, scale_dtype=q.scale_dtype)


def saliency(w: Float[Array, "k n"], diagonal: Float[Array, " k"], q: Quantize) -> Float[Array, "k n"]:
    """How much hangs on each weight: w^2 / U_jj^2 by the diagonal of U, or the weight itself.

    Raises:
      UserError: no such measure.
    """
    if one_of(q.saliency, ("hessian", "magnitude"), "config.quantize.saliency") == "magnitude":
        return w
    return w**2 / diagonal[:, None] ** 2


def between_0_and_1(value: float, key: str, fix: str) -> float:
    """`value`, if it is a share of the weights that is neither none nor all of them.

    Raises:
      UserError: it is not.
    """
    if not 0 < value < 1:
        raise UserError(f"config.quantize.{key}={value} is a share of the weights: above 0 and below 1; {fix}")
    return value


def _pruned(
    w: Float[Array, "m n"], h: Float[Array, "m m"], q: Quantize, levels: grids.Levels | None, name: str
) -> Float[Array, "m n"]:
    pattern = parse_pattern(q, w.shape[0], name)
    if not pattern:
        between_0_and_1(q.sparsity, "sparsity", "0.5 is half of them; for none use --config.quantize.method=gptq")
        w, levels = jax.tree.map(gathered, (w, levels))  # the weights of all outputs compete
    alive, u, _ = prepared(w, h, q.damp, name, q.block)
    return _solve(alive, u, levels, q, pattern, w.shape[0])


def parse_pattern(q: Quantize, inputs: int, name: str) -> Pattern | None:
    """N and M of `q.pattern`, if there is one.

    Raises:
      UserError: it is no pattern, or M does not divide the inputs.
    """
    if not q.pattern:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", q.pattern)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise UserError(
            f"config.quantize.pattern={q.pattern!r} is not N:M, of every M inputs N go, with 0 < N < M; such as 2:4"
        )
    at_once = STRIP if q.block % STRIP == 0 else q.block
    for size, what in ((inputs, f"inputs of {name}"), (at_once, "inputs that are worked through at once")):
        if size % m:
            fits = [k for k in range(2, 17) if inputs % k == 0 and at_once % k == 0]
            raise UserError(
                f"config.quantize.pattern={q.pattern}: {m} does not divide the {size} {what}; M may be "
                f"{', '.join(map(str, fits)) or 'none'} with --config.quantize.block={q.block}"
            )
    return n, m


@partial(jax.jit, static_argnums=(3, 4, 5))
def _solve(
    w: Float[Array, "p n"], u: Float[Array, "p p"], levels: grids.Levels | None, q: Quantize, pattern: Pattern | None,
    inputs: int,
) -> Float[Array, "m n"]:
    """The first `inputs` rows, pruned. The state is the map of what goes, of one block or of M inputs."""
    size = pattern[1] if pattern else q.block
    diagonal = jnp.diagonal(u)

    def scores(rows: Array, place: Array) -> Array:
        return rows**2 / jax.lax.dynamic_slice_in_dim(diagonal, place, size)[:, None] ** 2

    def begin(drop: Array, w: Array, start: Array, place: Array) -> Array:
        if pattern:
            return drop
        return _lowest_share(scores(jax.lax.dynamic_slice_in_dim(w, start, size), place), q.sparsity, place, inputs)

    def choose(drop: Array, place: Array, row: Array, ahead: Ahead) -> tuple[Array, Array]:
        if pattern:
            anew = lambda: lowest(scores(ahead(size), place), pattern[0])  # noqa: E731
            drop = jax.lax.cond(place % size == 0, anew, lambda: drop)
        kept = row.astype(q.scale_dtype).astype(row.dtype)
        if levels is not None:
            kept = levels.decode(levels.encode(row[None]))[0]
        return jnp.where(drop[place % size], 0, kept), drop

    nothing = jnp.zeros_like(w[:size], bool)
    return solve(w, u, Choice(begin, choose), nothing, block=q.block, unit=q.block)[0][:inputs]


def _lowest_share(scores: Float[Array, "b n"], share: float, place: Array, inputs: int) -> Bool[Array, "b n"]:
    """The lowest scores of a block that begins at `place`; inputs past the last are padding and do not count."""
    b, n = scores.shape
    padding = (jnp.arange(b) + place >= inputs)[:, None]
    scores = jnp.where(padding, jnp.inf, scores)
    last = jnp.where(place + b <= inputs, int(b * n * share), int(inputs % b * n * share))
    return scores <= jnp.sort(scores.ravel())[last]


def lowest(scores: Float[Array, "k n"], count: int) -> Bool[Array, "k n"]:
    """The `count` lowest scores of each output; of equal ones, the first inputs'."""
    k = jnp.arange(scores.shape[0])
    one, other = scores[:, None], scores[None]
    before = (other < one) | ((other == one) & (k[None] < k[:, None])[..., None])
    return jnp.sum(before, axis=1) < count
