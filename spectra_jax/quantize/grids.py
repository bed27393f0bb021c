"""The uniform grids in use, by name: where a run of weights puts its levels.

They differ in the divisor and in whether zero is a level of its own, which is enough to change 3-bit results; a
number without the name of its grid says little.

  gptq             scale = max|w| / (2^(b-1) - 1/2), codes -2^(b-1) .. 2^(b-1)-1 (IST-DASLab's GPTQ, Qwix)
  gptq_asymmetric  scale = (max - min) / (2^b - 1), the range stretched to hold 0, and a zero point
  awq              the same, with the true minimum and maximum
  int              scale = max|w| / (2^(b-1) - 1), codes from -2^(b-1) (LR-QAT)
  absmax           the same, codes from -(2^(b-1) - 1) (SmoothQuant, LLM.int8())
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectra_jax.errors import UserError
from spectra_jax.schema import Quantize

GRIDS = ("gptq", "gptq_asymmetric", "awq", "int", "absmax")
SHRINKS, SHRINK_POWER = 80, 2.4  # the search of `mse`: the range times 1 - k/100, error |w - w'|^2.4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Levels:
    """The levels of each group: `scale * (code - zero)`, codes from `low` to `high`. Symmetric: zero is None."""

    scale: Float[Array, "... n"]
    zero: Float[Array, "... n"] | None
    low: Float[Array, ""]
    high: Float[Array, ""]

    def encode(self, w: Float[Array, "... n"]) -> Float[Array, "... n"]:
        """The nearest codes, ties to even, as whole numbers in the dtype of `w`."""
        code = jnp.round(w / self.scale) + (0 if self.zero is None else self.zero)
        return jnp.clip(code, self.low, self.high)

    def decode(self, codes: Float[Array, "... n"]) -> Float[Array, "... n"]:
        """The weights that codes stand for."""
        return self.scale * (codes if self.zero is None else codes - self.zero)


def is_symmetric(grid: str) -> bool:
    """Whether a grid has no zero points."""
    return grid in ("gptq", "int", "absmax")


def code_range(grid: str, bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    if not is_symmetric(grid):
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + (grid == "absmax"), 2 ** (bits - 1) - 1


def group_of(inputs: int, q: Quantize, name: str) -> int:
    """How many inputs share levels.

    Raises:
      UserError: groups do not divide the inputs.
    """
    group = q.group or inputs
    if inputs % group:
        near = min((g for g in range(1, inputs + 1) if inputs % g == 0), key=lambda g: abs(g - group))
        raise UserError(
            f"config.quantize.group={group} does not divide the {inputs} inputs of {name}; use {near}, or 0 for one "
            "group"
        )
    return group


@partial(jax.jit, static_argnames=("grid", "bits", "mse", "scale_dtype"))
def fit(
    w: Float[Array, "... m n"], grid: str, bits: int, *, mse: bool = False, scale_dtype: str = "float32"
) -> Levels:
    """Levels for each run of m weights (of each output n).

    Args:
      mse: search for the shrunken range with the smallest |error|^2.4 instead of taking the whole range.
      scale_dtype: scales are rounded to it before codes are taken, so that what is stored is what was meant.
    """
    largest = jnp.max(w, axis=-2, keepdims=True)
    smallest = jnp.min(w, axis=-2, keepdims=True)

    def levels(shrink: float | Array) -> Levels:
        return _levels(smallest * shrink, largest * shrink, grid, bits, scale_dtype)

    def error(shrink: Array) -> Array:
        found = levels(shrink)
        return jnp.sum(jnp.abs(found.decode(found.encode(w)) - w) ** SHRINK_POWER, axis=-2, keepdims=True)

    if not mse:
        return _drop_dim(levels(1.0))
    best = jnp.argmin(jax.lax.map(lambda k: error(1.0 - k / 100), jnp.arange(SHRINKS, dtype=w.dtype)), axis=0)
    return _drop_dim(levels(1.0 - best.astype(w.dtype) / 100))


def _drop_dim(levels: Levels) -> Levels:
    zero = None if levels.zero is None else levels.zero[..., 0, :]
    return Levels(levels.scale[..., 0, :], zero, levels.low, levels.high)


def _levels(smallest: Array, largest: Array, grid: str, bits: int, scale_dtype: str) -> Levels:
    low, high = code_range(grid, bits)
    steps = 2**bits - 1
    if grid == "awq":
        scale = jnp.maximum(largest - smallest, 1e-5) / steps
    else:
        absmax = jnp.maximum(jnp.abs(largest), jnp.abs(smallest))
        absmax = jnp.where(absmax == 0, 1.0, absmax)
        if grid == "gptq":
            # A run without a negative weight keeps its lower end at 0, as the reference does: its upper half is cut.
            scale = jnp.where(smallest < 0, 2 * absmax, absmax) / steps
        elif grid == "gptq_asymmetric":
            bottom, top = jnp.minimum(smallest, 0), jnp.maximum(largest, 0)
            empty = (bottom == 0) & (top == 0)
            bottom, top = jnp.where(empty, -1.0, bottom), jnp.where(empty, 1.0, top)
            scale = (top - bottom) / steps
        else:
            scale = absmax / (2 ** (bits - 1) - 1)
    scale = _stored(scale, scale_dtype)
    if is_symmetric(grid):
        zero = None
    elif grid == "awq":
        zero = jnp.clip(-jnp.round(smallest / scale), 0, steps)
    else:
        zero = jnp.round(-bottom / scale)
    as_number = lambda value: jnp.asarray(value, scale.dtype)  # noqa: E731
    return Levels(scale, zero, as_number(low), as_number(high))


def _stored(scale: Array, dtype: str) -> Array:
    """`scale` as it will be read back; never 0."""
    smallest = jnp.finfo(dtype).smallest_subnormal if dtype == "float16" else jnp.finfo(dtype).tiny
    return jnp.maximum(scale.astype(dtype), smallest).astype(scale.dtype)
