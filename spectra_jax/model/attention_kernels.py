"""Causal attention by kernels of accelerators, which never hold scores in memory, forward or backward.

Each of the functions takes (B, T, N, H) queries and (B, T, K, H) keys and values, on a mesh divided along B and heads.
Every device runs the kernel on its own: shardings in types end at a kernel. (Under an explicit mesh the type of cuDNN's
result would say that every device holds all of it.)
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float

from spectra_jax.sharding import in_mesh

TILE = 128  # tokens in the smallest tile of splash, and in the largest of flash
# Not measured yet. On Hopper these run on its warpgroup instructions, which a backward tile of 32 is too small for.
FLASH_TILES = dict(
    block_q=TILE, block_k=TILE, **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
)


def splash_kernel(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], *, interpret: bool = False
) -> Float[Array, "B T N H"]:
    """JAX's kernel for TPUs (T a multiple of `TILE`); `interpret` runs it anywhere, for tests."""

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

    return _on_each_device(local, q, k, v)


def cudnn_kernel(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """NVIDIA's kernel through `jax.nn`.

    Raises:
      RuntimeError: cuDNN is not installed, which JAX asks for as it traces; no GPU is needed until the program runs.
      NotImplementedError: not 16-bit floats, or head dims that are no multiple of 8 or too many.
    """

    def local(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    return _on_each_device(local, q, k, v)


def flash_kernel(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], *, interpret: bool = False
) -> Float[Array, "B T N H"]:
    """JAX's kernel for GPUs in Triton (T a multiple of `TILE`); `interpret` runs it anywhere, for tests."""
    # Here and not above: JAX 0.12 warns at the import that tokamax is to take its place.
    from jax.experimental.pallas.ops.gpu import attention

    def local(q: Array, k: Array, v: Array) -> Array:
        # It knows no groups. What this writes is small beside scores: N/K times the keys and values of one layer.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        run = partial(attention.mha, segment_ids=None, sm_scale=q.shape[3] ** -0.5, causal=True)
        return run(q, k, v, block_sizes=attention.BlockSizes(**FLASH_TILES), interpret=interpret)

    return _on_each_device(local, q, k, v)


def _on_each_device(local: Callable, q: Array, k: Array, v: Array) -> Array:
    if in_mesh():
        specs = tuple(jax.typeof(x).sharding.spec for x in (q, k, v))
        # Without vma: a kernel's result does not say over which axes it varies.
        local = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)
    return local(q, k, v)
