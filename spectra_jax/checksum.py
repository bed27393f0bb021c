"""A checksum of an array's values that does not depend on where they lie.

Every element's bits are mixed with its position and the results added modulo 2^32, once plain and once weighted by
position. Addition has no order, so the sums are the same however the array is cut over devices, processes and files,
and each device only reads its own part. One changed element always changes both: the mixing is a bijection.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped, UInt32


def _words(x: Shaped[Array, "*n"]) -> UInt32[Array, "*n"]:
    """The bits of every element, in 32 bits; an element of 64 becomes two."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    size = x.dtype.itemsize
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)).astype(jnp.uint32)


def checksum(x: Shaped[Array, "*n"]) -> UInt32[Array, "2"]:
    """The plain and the weighted sum; works under jit on an array of any sharding."""
    words, stride, position = _words(x), 1, jnp.uint32(0)
    for dim in reversed(range(words.ndim)):
        line = [1] * words.ndim
        line[dim] = words.shape[dim]
        position = position + jnp.arange(words.shape[dim], dtype=jnp.uint32).reshape(line) * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    mixed = words ^ (position + jnp.uint32(1)) * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ mixed >> 16) * jnp.uint32(0x85EBCA6B)  # the finalizer of murmur3, 32 bits
    mixed = (mixed ^ mixed >> 13) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ mixed >> 16
    sums = mixed, mixed * (position * jnp.uint32(2) + jnp.uint32(1))
    if words.ndim > 1:  # in two stages, of which a CPU spreads the first over its cores
        sums = jax.lax.optimization_barrier(tuple(_add_up(sums, (words.ndim - 1,))))
    return jnp.stack(_add_up(sums, range(sums[0].ndim)))


def _add_up(sums: Sequence[UInt32[Array, "*n"]], dims: Sequence[int]) -> Sequence[UInt32[Array, "*m"]]:
    """Both in one pass: for two sums XLA would write all elements to memory first, and take four times as long."""
    zero = jnp.uint32(0)
    return jax.lax.reduce(tuple(sums), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(dims))


@jax.jit
def _checksums(leaves: list[Array]) -> list[Array]:
    return [checksum(leaf) for leaf in leaves]


dotted = partial(jax.tree_util.keystr, simple=True, separator=".")


def start_sums(tree: PyTree) -> dict[str, UInt32[Array, "2"]]:
    """Dotted path -> sums of every array of a tree; the devices are at work on them when it returns."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree))
    return {dotted(path): sums for path, sums in zip(paths, _checksums(list(leaves)))}


def read_sums(started: Mapping[str, UInt32[Array, "2"]]) -> dict[str, str]:
    """The same as 16 hex digits each, once they are there."""
    return {path: f"{plain:08x}{weighted:08x}" for path, (plain, weighted) in jax.device_get(dict(started)).items()}


def checksums(tree: PyTree) -> dict[str, str]:
    """Dotted path -> 16 hex digits, for every array of a tree."""
    return read_sums(start_sums(tree))


def wrong(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Paths whose checksums differ or stand on one side only."""
    return sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
