"""The Hessian of a linear layer's squared output error, and the factor that second-order methods work with.

Conventions of GPTQ (arXiv 2210.17323) and SparseGPT (arXiv 2301.00774), which all methods here share.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectra_jax.errors import UserError
from spectra_jax.sharding import in_mesh

HIGHEST = jax.lax.Precision.HIGHEST
LEAF, WIDE = 32, 1024  # rows eliminated one by one, dims whose products are taken in one: matters of speed alone
DAMP_LIMIT = 1.0  # of the mean of the diagonal; a matrix that needs more holds no information


@jax.jit
def products(x: Float[Array, "B T m"]) -> Float[Array, "m m"]:
    """Sum of x x^T over all tokens, in float32 and on every device. H is 2/sequences times the sum over batches."""
    return _products(x.reshape(-1, x.shape[-1]).astype(jnp.float32))


def _products(x: Float[Array, "r m"]) -> Float[Array, "m m"]:
    """By halves of a wide x: what is below the diagonal is not computed again."""
    m, half = x.shape[1], x.shape[1] // 2
    dot = partial(jnp.einsum, "ri,rj->ij", precision=HIGHEST, out_sharding=jax.P() if in_mesh() else None)
    if m <= WIDE:
        return dot(x, x)
    first, second = x[:, :half], x[:, half:]
    across = dot(first, second)
    return jnp.block([[_products(first), across], [across.T, _products(second)]])


def revive(h: Float[Array, "m m"], w: Float[Array, "m n"]) -> tuple[Array, Array]:
    """Inputs that were always 0: their diagonal becomes 1 and their weights 0, for nothing depends on them."""
    dead = jnp.diagonal(h) == 0
    return h + jnp.diag(dead.astype(h.dtype)), jnp.where(dead[:, None], 0.0, w)


@partial(jax.jit, static_argnames="damp")
def factor(h: Float[Array, "m m"], damp: float) -> Float[Array, "m m"]:
    """Upper triangular U with (H + damp mean(diag H) I)^-1 = U^T U; NaN where that is not positive definite.

    Not by inverting H: with the rows and columns of H turned round, H = R R^T has an upper triangular R, and U is
    its inverse. One Cholesky factor that is inverted as it is made, instead of two and a product.
    """
    h = h + damp * jnp.mean(jnp.diagonal(h)) * jnp.eye(h.shape[0], dtype=h.dtype)
    return _inverse_cholesky(h[::-1, ::-1])[::-1, ::-1]


def _inverse_cholesky(h: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """Inverse of H's lower triangular factor, by halves, so that nearly all work is products of matrices.

    LAPACK is slower, and the threads it leaves waiting on a CPU slow down whatever follows.
    """
    m = h.shape[0]
    if m <= LEAF:
        return _eliminate(h)
    half = -(-m // (2 * LEAF)) * LEAF
    dot = partial(jnp.dot, precision=HIGHEST)
    first = _inverse_cholesky(h[:half, :half])
    below = dot(h[half:, :half], first.T)
    second = _inverse_cholesky(h[half:, half:] - _products(below.T))
    return jnp.block([[first, jnp.zeros_like(below.T)], [-dot(second, dot(below, first)), second]])


def _eliminate(h: Float[Array, "b b"]) -> Float[Array, "b b"]:
    """The same for a small matrix: [H, I] becomes [L^T, L^-1] by elimination, a row after the other."""
    b = h.shape[0]

    def one(j: Array, rows: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(rows, j, 1)
        row = row * jax.lax.rsqrt(jax.lax.dynamic_slice(row, (0, j), (1, 1)))
        below = jnp.where(jnp.arange(b) > j, row[0, :b], 0)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(rows - below * row, row, j, 0)

    return jax.lax.fori_loop(0, b, one, jnp.concatenate([h, jnp.eye(b, dtype=h.dtype)], 1))[:, b:]


def damped_factor(h: Float[Array, "m m"], damp: float, name: str) -> tuple[Array, float]:
    """`factor`, with the damping raised tenfold until the matrix is positive definite; and the damping used.

    Raises:
      UserError: even DAMP_LIMIT is not enough, or H is not finite.
    """
    tried = damp
    while True:
        u = factor(h, tried)
        if bool(jnp.isfinite(jnp.sum(u))):
            return u, tried
        if tried >= DAMP_LIMIT:
            raise UserError(
                f"{name}: the Hessian of its inputs is not positive definite with a damping of {damp:g} to {tried:g} "
                "of its mean diagonal; look for NaN or infinite weights, or give more calibration text"
            )
        tried = min(max(10 * tried, 1e-4), DAMP_LIMIT)


def prepared(
    w: Float[Array, "m n"], h: Float[Array, "m m"], damp: float, name: str, unit: int = 1, act_order: bool = False
) -> tuple[Float[Array, "p n"], Float[Array, "p p"], Int[Array, " m"]]:
    """Weights and U as the methods take them, and the order of the inputs: by `act_order` the largest diagonal first.

    Dead inputs have weights of 0; up to a multiple of `unit` there are inputs more that do nothing.

    Raises:
      UserError: as `damped_factor`.
    """
    padding = -w.shape[0] % unit
    alive, h, order = _ordered(w, h, padding, act_order)
    u, used = damped_factor(h, damp, name)
    if used != damp:
        said = f"{name}: the damping was raised from {damp:g} to {used:g}, for less is not positive definite"
        print(said, file=sys.stderr, flush=True)
    return alive, _padded(u, padding), order


@partial(jax.jit, static_argnums=(2, 3))
def _ordered(w: Array, h: Array, padding: int, act_order: bool) -> tuple[Array, Array, Array]:
    h, alive = revive(h, w)
    order = jnp.argsort(-jnp.diagonal(h)) if act_order else jnp.arange(h.shape[0])
    if act_order:
        alive, h = alive[order], h[order][:, order]
    return jnp.pad(alive, ((0, padding), (0, 0))), h, order


@partial(jax.jit, static_argnums=1)
def _padded(u: Array, padding: int) -> Array:
    return jax.scipy.linalg.block_diag(u, jnp.eye(padding, dtype=u.dtype)) if padding else u
