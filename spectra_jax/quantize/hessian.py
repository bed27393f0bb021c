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
DAMP_LIMIT = 1.0  # of the mean of the diagonal; a matrix that needs more holds no information


def products(x: Float[Array, "B T m"]) -> Float[Array, "m m"]:
    """Sum of x x^T over all tokens, in float32 and on every device. H is 2/sequences times the sum over batches."""
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    spec = jax.P() if in_mesh() else None
    return jnp.einsum("ri,rj->ij", flat, flat, precision=HIGHEST, out_sharding=spec)


def revive(h: Float[Array, "m m"], w: Float[Array, "m n"]) -> tuple[Array, Array]:
    """Inputs that were always 0: their diagonal becomes 1 and their weights 0, for nothing depends on them."""
    dead = jnp.diagonal(h) == 0
    return h + jnp.diag(dead.astype(h.dtype)), jnp.where(dead[:, None], 0.0, w)


@partial(jax.jit, static_argnames="damp")
def factor(h: Float[Array, "m m"], damp: float) -> Float[Array, "m m"]:
    """Upper triangular U with (H + damp mean(diag H) I)^-1 = U^T U; NaN where that is not positive definite.

    Not by inverting H: with the rows and columns of H turned round, H = R R^T has an upper triangular R, and U is
    its inverse. One Cholesky factor and one triangular solve instead of two and a product.
    """
    h = h + damp * jnp.mean(jnp.diagonal(h)) * jnp.eye(h.shape[0], dtype=h.dtype)
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(h.shape[0], dtype=h.dtype), lower=True)
    return inverse[::-1, ::-1]


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
