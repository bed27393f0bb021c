"""Causal attention by name. Every form takes and returns the same shapes and computes the same function."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from spectra_jax.errors import one_of
from spectra_jax.sharding import in_mesh

TILE = 128  # tokens in the smallest tile of the TPU's kernel
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
    """JAX's own kernel for TPUs, which never holds scores in memory, forward or backward.

    Its tiles are of 128 tokens at least: where T is no multiple (a short prompt), and on anything but a TPU,
    `causal_blocks` computes the same.
    """
    other = partial(causal_blocks, blocks=blocks)
    if q.shape[1] % TILE:
        return other(q, k, v)
    return jax.lax.platform_dependent(q, k, v, tpu=splash_kernel, default=other)


def splash_kernel(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], *, interpret: bool = False
) -> Float[Array, "B T N H"]:
    """The kernel on every device's own sequences and heads; `interpret` runs it anywhere, for tests."""

    def local(q: Array, k: Array, v: Array) -> Array:
        _, T, N, H = q.shape
        tile = next(size for size in (512, 384, 256, TILE) if T % size == 0)
        names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
        sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, tile), use_fused_bwd_kernel=True)
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * N)
        run = splash_attention_kernel.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        q, k, v = (jnp.transpose(x, (0, 2, 1, 3)) for x in (q * H**-0.5, k, v))
        return jnp.transpose(jax.vmap(run)(q, k, v), (0, 2, 1, 3)).astype(v.dtype)

    if in_mesh():
        specs = tuple(jax.typeof(x).sharding.spec for x in (q, k, v))
        # Without vma: a kernel's result does not say over which axes it varies.
        local = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return local(q, k, v)


ATTENTION: dict[str, Callable] = {"reference": reference, "causal_blocks": causal_blocks, "splash": splash}


def get_attention(name: str) -> Callable:
    """The attention of this name.

    Raises:
      UserError: there is none; the message names the nearest.
    """
    return ATTENTION[one_of(name, ATTENTION, "config.model.attention")]
