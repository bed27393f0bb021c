"""Causal attention by name. Every form takes and returns the same shapes and computes the same function."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from spectra_jax.errors import one_of
from spectra_jax.model.attention_kernels import TILE, cudnn_kernel, flash_kernel, splash_kernel
from spectra_jax.sharding import in_mesh

MASKED = -1e30  # finite, so that no row can turn into NaN


def reference(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], blocks: int
) -> Float[Array, "B T N H"]:
    """JAX's own attention: every score computed. `blocks` is ignored."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def causal_blocks(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], blocks: int
) -> Float[Array, "B T N H"]:
    """Queries in `blocks` runs, each against the keys up to its end only: (1 + 1/blocks)/2 of the products.

    T need not be divisible by `blocks`; the last run may be shorter. Scores and sums are in float32. The softmax is
    divided by its sum after the product with the values, where a row is H long and not T (arXiv 2205.14135).
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # Said and not inferred: a dim of size 1 (one sequence, one key head) may lose its axis in a reshape.
    batch, _, heads, _ = jax.typeof(q).sharding.spec
    grouped = PartitionSpec(batch, None, heads, None, None) if in_mesh() else None
    # Heads before time: every head's product is then one contiguous matrix product.
    q = jnp.transpose(jnp.reshape(q, (B, T, K, N // K, H), out_sharding=grouped) * H**-0.5, (0, 2, 3, 1, 4))
    k, v = jnp.transpose(k, (0, 2, 1, 3)), jnp.transpose(v, (0, 2, 1, 3))
    size = -(-T // blocks)
    runs = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        scores = jnp.einsum(
            "bkgth,bksh->bkgts", q[:, :, :, start:stop], k[:, :, :stop], preferred_element_type=jnp.float32
        )
        mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
        scores = jnp.where(mask[None, None, None], scores, MASKED)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        shares = jnp.exp(scores - top)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        mixed = jnp.einsum(
            "bkgts,bksh->bkgth", shares.astype(v.dtype), v[:, :, :stop], preferred_element_type=jnp.float32
        )
        runs.append((mixed / total).astype(v.dtype))
    mixed = jnp.transpose(jnp.concatenate(runs, axis=3), (0, 3, 1, 2, 4))
    joined = PartitionSpec(batch, None, heads, None) if in_mesh() else None
    return jnp.reshape(mixed, (B, T, N, H), out_sharding=joined)


def splash(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], blocks: int
) -> Float[Array, "B T N H"]:
    """JAX's own kernel for TPUs, where T is a multiple of 128; elsewhere `causal_blocks`, as for a short prompt.

    So it is with float16, which the compiler of TPU kernels does not load.
    """
    other = partial(causal_blocks, blocks=blocks)
    if q.shape[1] % TILE or q.dtype == jnp.float16:
        return other(q, k, v)
    return jax.lax.platform_dependent(q, k, v, tpu=splash_kernel, default=other)


def cudnn(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], blocks: int
) -> Float[Array, "B T N H"]:
    """NVIDIA's kernel, for GPUs of compute capability 8.0 and newer; the one to use on Hopper.

    It takes float16 and bfloat16, heads of a multiple of 8 dims up to 128, and T from 128 on (less would bring
    nothing); elsewhere `causal_blocks`. The order of sums in its backward pass is not fixed, so a repeated or resumed
    run may differ in the last bits, unless XLA_FLAGS has --xla_gpu_exclude_nondeterministic_ops=true (XLA's
    documentation, "Determinism (GPU)").
    """
    other = partial(causal_blocks, blocks=blocks)
    # JAX asks for cuDNN as it traces, so where it is not installed the branch for GPUs cannot even be traced.
    if jax.default_backend() != "gpu" or not _fits_gpus(q) or q.shape[3] % 8:
        return other(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cuda=cudnn_kernel, default=other)


def flash(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], blocks: int
) -> Float[Array, "B T N H"]:
    """JAX's own kernel for GPUs, in Triton, with all sums in a fixed order.

    It takes float16 and bfloat16, heads of up to 128 dims, and multiples of 128 as T; elsewhere `causal_blocks`.
    """
    other = partial(causal_blocks, blocks=blocks)
    if not _fits_gpus(q) or q.shape[1] % TILE:
        return other(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cuda=flash_kernel, default=other)


def _fits_gpus(q: Float[Array, "B T N H"]) -> bool:
    return q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[1] >= TILE and q.shape[3] <= 128


ATTENTION: dict[str, Callable] = {form.__name__: form for form in (reference, causal_blocks, splash, cudnn, flash)}


def get_attention(name: str) -> Callable:
    """The attention of this name.

    Raises:
      UserError: there is none; the message names the nearest.
    """
    return ATTENTION[one_of(name, ATTENTION, "config.model.attention")]
