"""GPTQ (arXiv 2210.17323): round each input's weights and let those not rounded yet make up for the error.

It follows the reference in what the paper leaves open: levels of a column come from the weights before dead inputs
are zeroed; levels of a group from the weights as updated by earlier blocks, not within the block at hand; dead inputs
before the mean of the diagonal that the damping is taken of. With groups smaller than the block this differs from
"fresh" scales, and with groups of a block or more it does not.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectra_jax.errors import UserError
from spectra_jax.quantize import grids
from spectra_jax.quantize.feedback import Ahead, Choice, solve
from spectra_jax.quantize.hessian import prepared
from spectra_jax.schema import Quantize
from spectra_jax.weights.grid import Grid


def gptq(w: Float[Array, "m n"], h: Float[Array, "m m"], q: Quantize, name: str = "matrix") -> Grid:
    """The quantized matrix.

    Args:
      w: the weights (in, out), in the dtype that the work is done in.
      h: Hessian of its inputs (`hessian.products`, times 2 over sequences; any factor gives the same result).
      name: of the matrix, in messages.

    Raises:
      UserError: groups that do not divide, or a Hessian that is not positive definite.
    """
    group, unit = _units(w.shape[0], q, name)
    current, u, order = prepared(w, h, q.damp, name, unit, q.act_order)
    return _gptq(w, current, u, order, q, group, unit)


def _units(m: int, q: Quantize, name: str) -> tuple[int, int]:
    """The size of a group, and the unit in which inputs are worked through."""
    group = grids.group_of(m, q, name)
    if group == m or q.static_groups:
        return group, q.block
    if q.block % group and group % q.block:
        raise UserError(
            f"config.quantize.group={group} and block={q.block}: one must divide the other, for levels are taken "
            f"between blocks; use --config.quantize.block={group}"
        )
    return group, max(group, q.block)


@partial(jax.jit, static_argnums=(4, 5, 6))
def _gptq(
    w: Float[Array, "m n"], current: Float[Array, "p n"], u: Float[Array, "p p"], order: Int[Array, " m"], q: Quantize,
    group: int, unit: int,
) -> Grid:
    (m, n), size, back = w.shape, u.shape[0], jnp.argsort(order)
    fit = partial(grids.fit, grid=q.grid, bits=q.bits, mse=q.mse, scale_dtype=q.scale_dtype)
    static = q.static_groups or group == m
    # Final levels where they do not follow the updates; elsewhere they only hold the place of those to come.
    source = w if group == m else current[:m][back] if static else current
    levels = fit(source.reshape(-1, group, n))
    of_input = jnp.pad(order, (0, size - m)) // group if static else jnp.arange(size) // group

    def begin(levels: grids.Levels, w: Array, start: Array, place: Array) -> grids.Levels:
        if static:
            return levels
        count = max(group, q.block)
        rows = lambda: jax.lax.dynamic_slice_in_dim(w, start, count).reshape(-1, group, n)  # noqa: E731
        # A group longer than a block has its levels taken where it begins.
        return jax.lax.cond(place % count == 0, lambda: _put(levels, fit(rows()), place // group), lambda: levels)

    def choose(levels: grids.Levels, place: Array, row: Array, ahead: Ahead) -> tuple[Array, grids.Levels]:
        mine = _of_group(levels, of_input[place])
        return mine.decode(mine.encode(row)), levels

    fixed, levels = solve(current, u, Choice(begin, choose), levels, block=q.block, unit=unit)
    levels = jax.tree.map(lambda x: x[: m // group] if x.ndim else x, levels)
    moved = None if static or not q.act_order else of_input[back].astype(jnp.int32)
    return as_grid(fixed[:m][back], levels, moved, q)


@partial(jax.jit, static_argnames=("q", "tokens8", "threshold"))
def as_grid(
    w: Float[Array, "m n"], levels: grids.Levels, groups: Int[Array, " m"] | None, q: Quantize, *,
    tokens8: bool = False, threshold: float = 0.0,
) -> Grid:
    """The stored form of a matrix, each weight at the nearest level of its group."""
    of_input = jnp.arange(w.shape[0]) // (w.shape[0] // levels.scale.shape[0]) if groups is None else groups
    # Left alone, XLA divides by one scale for many inputs as w * (1 / scale), and ties fall another way than in GPTQ;
    # the largest magnitudes are ties on the grid `gptq`.
    codes = jax.lax.optimization_barrier(_of_group(levels, of_input)).encode(w)
    dtype = jnp.int8 if levels.zero is None else jnp.uint8
    zeros = None if levels.zero is None else levels.zero.astype(jnp.uint8)
    scales = levels.scale.astype(q.scale_dtype)
    return Grid(codes.astype(dtype), scales, zeros, groups, bits=q.bits, tokens8=tokens8, threshold=threshold)


def _of_group(levels: grids.Levels, group: Array) -> grids.Levels:
    """The levels of one group, or of one per input."""
    return jax.tree.map(lambda x: x[group] if x.ndim else x, levels)


def _put(levels: grids.Levels, new: grids.Levels, group: Array) -> grids.Levels:
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, group, 0) if x.ndim else x  # noqa: E731
    return jax.tree.map(put, levels, new)
