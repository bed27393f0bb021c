"""Input by input: each one's weights are fixed, and those not yet fixed make up for the error (GPTQ, algorithm 1).

The published algorithms run over the columns of W (out, in); here W is (in, out), and a "column" is a row, contiguous
in memory, with all outputs side by side. What differs between the methods is the choice of the fixed weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectra_jax.quantize.hessian import HIGHEST

STRIP = 32  # inputs whose errors are added up before they reach the rest of the block: a matter of speed alone
SEGMENT = 4  # blocks per loop; between segments, updates are products of exactly the size that is needed

Ahead = Callable[[int], Float[Array, "k n"]]


class Choice(NamedTuple):
    """How weights are fixed. `state` is any pytree.

    begin: (state, W of the segment as updated up to here, start in it, start in the matrix) -> state, once per block.
    choose: (state, input, its weights (n,) as updated, ahead) -> (fixed weights (n,), state); `ahead(k)` gives the
      next k inputs' weights as updated, this one's first.
    """

    begin: Callable[[Any, Array, Array, Array], Any]
    choose: Callable[[Any, Array, Array, Ahead], tuple[Array, Any]]


def solve(
    w: Float[Array, "m n"], u: Float[Array, "m m"], choice: Choice, state: Any, *, block: int, unit: int
) -> tuple[Float[Array, "m n"], Any]:
    """Fixes every weight in the order of the inputs; returns the fixed matrix and the last state.

    Args:
      u: upper triangular factor of the inverse Hessian (`hessian.factor`).
      block: inputs between two updates of all that follows.
      unit: `m` is divided into segments of a multiple of so many inputs; a multiple of `block`, a divisor of `m`.
    """
    m = w.shape[0]
    size = -(-SEGMENT * block // unit) * unit

    def part(w: Array, low: int, high: int, state: Any) -> tuple[Array, Array, Any]:
        if high - low <= size:
            return _segment(w, u[low:high, low:high], low, choice, state, block)
        middle = low + -(-(high - low) // (2 * unit)) * unit
        first, errors, state = part(w[: middle - low], low, middle, state)
        rest = w[middle - low :] - jnp.dot(u[low:middle, middle:high].T, errors, precision=HIGHEST)
        second, more, state = part(rest, middle, high, state)
        return jnp.concatenate([first, second]), jnp.concatenate([errors, more]), state

    fixed, _, state = part(w, 0, m, state)
    return fixed, state


def _segment(
    w: Float[Array, "s n"], u: Float[Array, "s s"], first: int, choice: Choice, state: Any, block: int
) -> tuple[Array, Array, Any]:
    """Fixed weights, errors and state after a run of blocks; `first` is where the run begins in the matrix."""
    places = jnp.arange(w.shape[0])[None]

    def one(k: Array, carry: tuple) -> tuple:
        w, fixed, errors, state = carry
        start = k * block
        state = choice.begin(state, w, start, first + start)
        inner = jax.lax.dynamic_slice(u, (start, start), (block, block))
        q, e, state = _block(_rows(w, start, block), inner, first + start, choice, state)
        after = jnp.where(places >= start + block, _rows(u, start, block), 0)
        w = w - jnp.dot(after.T, e, precision=HIGHEST)
        return w, _put(fixed, q, start), _put(errors, e, start), state

    zeros = jnp.zeros_like(w)
    _, fixed, errors, state = jax.lax.fori_loop(0, w.shape[0] // block, one, (w, zeros, zeros, state))
    return fixed, errors, state


def _block(
    v: Float[Array, "b n"], u: Float[Array, "b b"], first: Int[Array, ""], choice: Choice, state: Any
) -> tuple[Array, Array, Any]:
    """The same for one block: strips of it, and each input of a strip from the errors of those before it."""
    b = v.shape[0]
    strip = STRIP if b % STRIP == 0 else b
    places = jnp.arange(b)[None]

    def one_strip(k: Array, carry: tuple) -> tuple:
        v, fixed, errors, state = carry
        start = k * strip
        mine, inner = _rows(v, start, strip), jax.lax.dynamic_slice(u, (start, start), (strip, strip))

        def one(j: Array, carry: tuple) -> tuple:
            fixed, errors, state = carry

            def ahead(count: int) -> Array:
                factors = jax.lax.dynamic_slice_in_dim(inner, j, count, 1)
                # `errors` of inputs not fixed yet are zeros, so that no mask is needed.
                return _rows(mine, j, count) - jnp.dot(factors.T, errors, precision=HIGHEST)

            row = ahead(1)[0]
            chosen, state = choice.choose(state, first + start + j, row, ahead)
            error = (row - chosen) / inner[j, j]
            return _put(fixed, chosen[None], j), _put(errors, error[None], j), state

        zeros = jnp.zeros_like(mine)
        q, e, state = jax.lax.fori_loop(0, strip, one, (zeros, zeros, state))
        after = jnp.where(places >= start + strip, _rows(u, start, strip), 0)
        v = v - jnp.dot(after.T, e, precision=HIGHEST)
        return v, _put(fixed, q, start), _put(errors, e, start), state

    zeros = jnp.zeros_like(v)
    _, fixed, errors, state = jax.lax.fori_loop(0, b // strip, one_strip, (v, zeros, zeros, state))
    return fixed, errors, state


def _rows(x: Array, start: Array, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count)


def _put(x: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)
