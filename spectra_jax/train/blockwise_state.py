"""Optimizer states in 8 bits, block by block (arXiv 2110.02861): an optax transformation whose states are so stored.

A block is 256 neighbours of the last dim, or what is left of it: blocks do not reach into the next row, so that a state
lies on the devices as its parameter does. Where 256 divides the last dim these are the blocks of bitsandbytes, which
cuts all of an array. 8.125 bits a number then.

Blocks do not depend on the mesh. Where a device's part of the last dim is a multiple of 256 nothing is communicated.
Elsewhere the devices that share blocks exchange a maximum for every gcd(256, part) numbers, and the scales of a row are
on all of them.

A second moment below 1.6e-7 of its block's largest becomes 0. If the gradient then is exactly 0, Adam divides what is
left of the first moment by its eps alone: a leap, with bitsandbytes too. So embeddings, whose rows rest, stay in
float32.
"""

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, UInt8

from spectra_jax.sharding import P, gathered, in_mesh, parts
from spectra_jax.train.dynamic_map import DynamicMap

BLOCK = 256


@no_type_check  # as a pytree it also carries shapes or shardings
class Blockwise(NamedTuple):
    """`absmax[block] * value(code)`. Zeros are code 0, of whatever value, times 0."""

    codes: UInt8[Array, "*L n"]
    absmax: Float[Array, "*L b"]


def quantize(x: Float[Array, "*L n"], kind: DynamicMap) -> Blockwise:
    """Each number over the largest of its block, to the nearest value."""
    runs = _runs(x)
    absmax = _of_blocks(jnp.max(jnp.abs(runs), axis=-1), runs.shape[-1])
    # A subnormal number has no reciprocal, and is nothing to a sum of squares.
    absmax = jnp.where(absmax < jnp.finfo(absmax.dtype).tiny, 0, absmax)
    scale = _of_runs(absmax, runs)
    # By way of the reciprocal, as bitsandbytes does it.
    codes = kind.nearest(jnp.clip(runs * (1 / jnp.where(scale == 0, 1, scale)), -1, 1))
    return Blockwise(jnp.where(scale == 0, 0, codes).astype(jnp.uint8).reshape(x.shape), absmax)


def dequantize(stored: Blockwise, kind: DynamicMap) -> Float[Array, "*L n"]:
    """The numbers in float32."""
    runs = _runs(stored.codes)
    return (kind.value(runs) * _of_runs(stored.absmax, runs)).reshape(stored.codes.shape)


def blockwise(
    inner: optax.GradientTransformation, chosen: Callable[[tuple, Array], bool], **maps: DynamicMap
) -> optax.GradientTransformation:
    """`inner`, with some of its states in 8 bits between steps. Its arithmetic is in float32, on what they stand for.

    Args:
      inner: its state is a named tuple.
      chosen: by path and array, whether a state is stored so.
      maps: the map of each field that holds states, by its name.
    """

    def each(state: optax.OptState, f: Callable[[DynamicMap, tuple, Array | Blockwise], Array | Blockwise]) -> PyTree:
        return state._replace(**{
            name: jax.tree.map_with_path(partial(f, kind), getattr(state, name), is_leaf=_is_stored)
            for name, kind in maps.items()
        })

    def stored(state: optax.OptState) -> optax.OptState:
        return each(state, lambda kind, path, x: quantize(x, kind) if chosen(path, x) else x)

    def floats(state: optax.OptState) -> optax.OptState:
        return each(state, lambda kind, _, x: dequantize(x, kind) if _is_stored(x) else x)

    def update(gradient: PyTree, state: optax.OptState, parameters: PyTree = None) -> tuple[PyTree, optax.OptState]:
        direction, new = inner.update(gradient, floats(state), parameters)
        return direction, stored(new)

    return optax.GradientTransformation(lambda parameters: stored(inner.init(parameters)), update)


def _is_stored(x: PyTree) -> bool:
    return isinstance(x, Blockwise)


def _spec(x: Array) -> list:
    """Mesh axes of every dim."""
    spec = tuple(jax.typeof(x).sharding.spec) if in_mesh() else ()
    return [*spec, *[None] * (x.ndim - len(spec))]


def _runs(x: Array) -> Array:
    """(..., n) as (..., runs, g): the longest runs that leave neither their block nor their device."""
    g = gcd(BLOCK, x.shape[-1] // parts(_spec(x)[-1]))
    return x.reshape(*x.shape[:-1], -1, g)


def _of_blocks(largest: Float[Array, "*L r"], g: int) -> Float[Array, "*L b"]:
    """The largest of each block from those of its runs of g numbers."""
    if g == BLOCK:
        return largest
    largest = gathered(largest, P(*_spec(largest)[:-1], None))
    room = [(0, 0)] * (largest.ndim - 1) + [(0, -largest.shape[-1] % (BLOCK // g))]
    return jnp.max(jnp.pad(largest, room).reshape(*largest.shape[:-1], -1, BLOCK // g), axis=-1)


def _of_runs(absmax: Float[Array, "*L b"], runs: Array) -> Float[Array, "*L r 1"]:
    """The scale of each run, lying as the runs do."""
    *outer, count, g = runs.shape
    if g != BLOCK:
        absmax = jnp.broadcast_to(absmax[..., None], (*absmax.shape, BLOCK // g)).reshape(*outer, -1)[..., :count]
        absmax = gathered(absmax, P(*_spec(runs)[:-1]))
    return absmax[..., None]
