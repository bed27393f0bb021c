"""Causal attention by name. Every form takes and returns the same shapes and computes the same function."""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spectra_jax.errors import UserError

MASKED = -1e30  # finite, so that a wholly masked row would not turn into NaN


def reference(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], blocks: int = 1
) -> Float[Array, "B T N H"]:
    """Softmax over all earlier positions, every score computed, in float32. `blocks` is ignored."""
    return causal_blocks(q, k, v, blocks=1)


def causal_blocks(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], blocks: int
) -> Float[Array, "B T N H"]:
    """Queries in `blocks` runs, each against the keys up to its end only: (1 + 1/blocks)/2 of the products.

    T need not be divisible by `blocks`; the last run may be shorter.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    size = -(-T // blocks)
    runs = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        scores = jnp.einsum(
            "btkgh,bskh->bkgts", q[:, start:stop], k[:, :stop], preferred_element_type=jnp.float32
        )
        mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
        scores = jnp.where(mask[None, None, None], scores * H**-0.5, MASKED)
        share = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        runs.append(jnp.einsum("bkgts,bskh->btkgh", share, v[:, :stop]))
    return jnp.concatenate(runs, axis=1).reshape(B, T, N, H)


ATTENTION: dict[str, Callable] = {"reference": reference, "causal_blocks": causal_blocks}


def get_attention(name: str) -> Callable:
    """The attention of this name.

    Raises:
      UserError: there is none; the message names the nearest.
    """
    if name not in ATTENTION:
        near = difflib.get_close_matches(name, ATTENTION, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"config.model.attention={name!r} is not one of {', '.join(ATTENTION)}{hint}")
    return ATTENTION[name]
