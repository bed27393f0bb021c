"""TPU: 2-bit weights in HBM, widened register by register in VMEM on their way into the matrix unit (MXU).

Memory layout "tpu": int32 words (m/16, n), m and n padded with codes of 0 to multiples of 128. A register of words
holds 128 inputs of 128 outputs, and four registers of bytes come out of it, in the order of the inputs:

    word [8k + r, output], byte b, its bits 2j + 1 and 2j   the code of input 128k + 32j + 4r + b
    (word << (6 - 2j)) & 0xC0C0C0C0                         that code on top of byte b: row 4r + b of the j-th register

A code in two's complement (00, 01, 11) on top of a byte is a number already: 64 times the code as int8, twice the code
as fp8 (e4m3); on top of 16 bits twice the code as bf16. So widening is a shift and an `and` per four weights (bf16:
two), without a table, a subtraction or a conversion. Not `jnp.int2`, which a TPU also keeps at 4 a byte: XLA widens
it to bytes where a loop over layers takes one layer's matrix out of all.

Activations keep 16 bits: as two int8 digits (`reference.digits`), two rows of one product, on MXUs of int8 (v5e, v5p,
v6e); elsewhere as bf16 and, of float32, its remainder as a second bf16. MXUs of v7x multiply bf16 by fp8.

Binary matrices (codes -1 and 1) are served too, at 2 bits; 3 and 4 bits and scales per group and output are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels import reference, tuning
from pallas_kernels.packing import Packed, expand
from pallas_kernels.tuning import GENERATIONS, ROWS, TILE

LAYOUT = "tpu"
SHIFTS = 2 * np.arange(4).reshape(4, 1, 1, 1) + 8 * np.arange(4).reshape(1, 1, 4, 1)  # of code (j, r, b) in a word
_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


@contextmanager
def target(generation: str) -> Iterator[None]:
    """Trace the kernel for this generation whatever the default device is: to compile ahead of time, or, together with
    `pltpu.force_tpu_interpret_mode`, to interpret it. Otherwise it fails when it is lowered for another platform. What
    was jitted inside keeps its generation.

    Raises:
      ValueError: an unknown generation.
    """
    if generation not in GENERATIONS:
        raise ValueError(f"there is no TPU generation {generation!r}; there are {', '.join(GENERATIONS)}")
    token = _TARGET.set(generation)
    try:
        yield
    finally:
        _TARGET.reset(token)


def convert(weights: Packed) -> Packed:
    """Canonical weights in the layout of the kernel; m and n stay the true ones."""
    if weights.layout == LAYOUT:
        return weights
    return replace(weights, data=_words(weights.codes()), layout=LAYOUT)


def codes(weights: Packed) -> Int8[Array, "*L m n"]:
    """The codes, of weights in this layout."""
    *L, words, n = weights.data.shape
    one_code = weights.data.reshape(*L, words // 8, 1, 8, 1, n)
    # Up to the top of the word and down again: the shift down copies the sign.
    spread = (one_code << (30 - _like(SHIFTS, one_code))) >> 30
    return spread.astype(jnp.int8).reshape(*L, 16 * words, n)[..., : weights.m, : weights.n]


@jax.jit  # in one pass: step by step it would take 16 times the room
def _words(codes: Int8[Array, "*L m n"]) -> Int32[Array, "*L w p"]:
    pad = [(0, 0)] * (codes.ndim - 2) + [(0, -size % TILE) for size in codes.shape[-2:]]
    *L, m, n = (size + sum(edge) for size, edge in zip(codes.shape, pad))
    tiles = jnp.pad(codes, pad).reshape(*L, m // TILE, 4, 8, 4, n)
    bits = (tiles.astype(jnp.int32) & 3) << _like(SHIFTS, tiles)
    return jnp.sum(bits, axis=(-4, -2), dtype=jnp.int32).reshape(*L, m // 16, n)


def _like(shifts: np.ndarray, tiles: Array) -> Array:
    """(4, 1, 4, 1) with as many leading dims as `tiles`."""
    return jnp.asarray(shifts, jnp.int32).reshape((1,) * (tiles.ndim - 4) + shifts.shape)


def refuses(x: jax.ShapeDtypeStruct, weights: Packed) -> str | None:
    """Anything but a TPU from v4 on, scales per group and output, float16."""
    g, s = weights.scales.shape[-2:]
    if _generation() is None:
        kind, known = jax.devices()[0].device_kind, ", ".join(GENERATIONS)
        return f"the default device is {kind!r}; this kernel is for TPUs: {known}"
    if g > 1 and s > 1:
        return f"scales {(g, s)} of groups and outputs do not factor out of the sum; the kernel takes (g, 1) or (1, s)"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {x.dtype}; TPUs have float32 and bfloat16"
    return None


def matmul(
    x: Float[Array, "M m"],
    weights: Packed,
    *,
    activation_bits: int = 16,
    blocks: tuple[int, int, int] | None = None,
) -> Float[Array, "M n"]:
    """In the dtype of x; sums exact with int8 (m below 2^18), else in float32.

    One scale per input shard multiplies x before its digits are taken, others the sums.

    Args:
      activation_bits: 16 is two digits, off by at most 2^-15 of the row's largest |x| with int8, 2^-17 of each |x| with
        bf16 (nothing if x is bf16). 8 is one digit, off by 2^-8 of these, at half the work of many rows.
      blocks: (bm, bk, bn) instead of those of `tuning.blocks`.

    Raises:
      ValueError: what `refuses` says, blocks that do not divide the stored matrix, other activation bits.
    """
    if reason := refuses(jax.ShapeDtypeStruct(x.shape, x.dtype), weights):
        raise ValueError(f"the TPU kernel cannot serve: {reason}")
    weights, generation = convert(weights), _generation()
    core, M, dtype = GENERATIONS[generation], x.shape[0], x.dtype
    m, n = 16 * weights.data.shape[0], weights.data.shape[1]
    bm, bk, bn = blocks or tuning.blocks(M, m, n, generation)
    if bm % ROWS or bk % TILE or bn % TILE or m % bk or n % bn:
        raise ValueError(
            f"blocks {(bm, bk, bn)} of a stored matrix {(m, n)}: bm takes a multiple of {ROWS}, bk and bn multiples of "
            f"{TILE} that divide it"
        )
    column = weights.scales.astype(jnp.float32)
    if column.shape[0] > 1:
        x, column = x.astype(jnp.float32) * expand(column, weights.m, weights.n).T, jnp.ones((1, 1))
    elif column.shape[1] > 1:
        column = jnp.pad(expand(column, weights.m, weights.n), [(0, 0), (0, n - weights.n)])
    x = jnp.pad(x, [(0, -M % bm), (0, m - weights.m)])
    digits, ratio, step = _digits(x, core.activations, activation_bits)
    digits = [_in_order(digit, core.weights).reshape(-1, bm, m) for digit in digits]
    rows = jnp.concatenate(digits, axis=1).reshape(-1, m)  # the digits of a block stand together
    step = step / (64 if core.weights == jnp.int8 else 2)  # what a code of 1 is
    kernel = partial(_kernel, weights=core.weights, ratio=ratio)
    return _call(kernel, rows, weights.data, step, column, dtype, (bm, bk, bn), generation)[:M, : weights.n]


def _call(kernel, x, data, step, column, dtype, blocks, generation) -> Array:
    """Rows of activations (digits * M, m) times the matrix of words (m/16, n): the kernel over the grid of blocks."""
    (bm, bk, bn), (_, m), n, M = blocks, x.shape, data.shape[1], step.shape[0]
    tall = bm * (x.shape[0] // M)
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    a_column = pl.BlockSpec((1, bn), lambda i, j, k: (0, j))
    one_scale = pl.BlockSpec((1, 1), lambda i, j, k: (0, 0))
    return pl.pallas_call(
        kernel,
        name="ternary_matmul",
        grid=(M // bm, n // bn, m // bk),
        in_specs=[
            pl.BlockSpec((tall, bk), lambda i, j, k: (i, k)),
            pl.BlockSpec((bk // 16, bn), lambda i, j, k: (k, j)),
            pl.BlockSpec((bm, 1), lambda i, j, k: (i, 0)),
            a_column if column.shape[1] > 1 else one_scale,
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, n), dtype),
        scratch_shapes=[pltpu.VMEM((tall, bn), sums)] if bk < m else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tuning.vmem_bytes(bm, bk, bn, generation),
            disable_bounds_checks=True,  # blocks divide the padded arrays; the checks cost some 60 cycles a step
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * m * n,
            transcendentals=0,
            bytes_accessed=m * n // 4 + x.size * x.dtype.itemsize + M * n * jnp.dtype(dtype).itemsize,
        ),
    )(x, data, step, column)


def _kernel(x, w, step, column, y, *sums, weights, ratio):
    """One block. Without `sums` it has all the inputs; otherwise they are the third dim of the grid."""
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    product = jax.lax.dot(x[...], _widen(w[...], weights), preferred_element_type=kind)

    def store(total):
        total = total.astype(jnp.float32)
        if ratio:
            high, low = jnp.split(total, 2)
            total = ratio * high + low
        y[...] = (total * step[...] * column[...]).astype(y.dtype)

    if not sums:
        store(product)
        return
    (total,), k = sums, pl.program_id(2)

    @pl.when(k == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    total[...] += product

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        store(total[...])


def _widen(words, dtype):
    """Words (bk/16, bn) as numbers (bk, bn) for the MXU, each what a code of 1 is times the code: see the top."""
    bits, n = 8 * jnp.dtype(dtype).itemsize, words.shape[1]
    mask = jnp.int32({8: -0x3F3F3F40, 16: -0x3FFF4000}[bits])  # 0xC0C0C0C0, 0xC000C000
    planes = [pltpu.bitcast((words << shift) & mask, dtype) for shift in range(bits - 2, -1, -2)]
    return jnp.stack([plane.reshape(-1, 256 // bits, n) for plane in planes], axis=1).reshape(-1, n)


def _digits(x: Float[Array, "M m"], kind: DTypeLike, bits: int) -> tuple[list[Array], int, Float[Array, "M 1"]]:
    """x = step (ratio digit + digit), or step digit with a ratio of 0."""
    if bits not in (8, 16):
        raise ValueError(f"activation_bits={bits}: the kernel takes activations in 16 or 8 bits")
    if kind == jnp.int8:
        if bits == 16:
            high, low, step = reference.digits(x)
            return [high, low], 128, step
        x = x.astype(jnp.float32)
        step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
        return [jnp.round(x / jnp.where(step > 0, step, 1)).astype(jnp.int8)], 0, step
    one = jnp.ones((x.shape[0], 1), jnp.float32)
    if bits == 8 or x.dtype == jnp.bfloat16:
        return [x.astype(jnp.bfloat16)], 0, one
    # Not a conversion there and back: XLA may leave that out, and then nothing remains for the second digit.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return [high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)], 1, one


def _in_order(x: Float[Array, "M m"] | Int8[Array, "M m"], weights: DTypeLike) -> Array:
    """Inputs as `_widen` leaves them: where they were with bytes; with 16 bits, in each 128 the even before the odd."""
    if jnp.dtype(weights).itemsize == 1:
        return x
    M, m = x.shape
    return x.reshape(M, m // TILE, 4, TILE // 8, 2).transpose(0, 1, 4, 2, 3).reshape(M, m)


def _generation() -> str | None:
    if name := _TARGET.get():
        return name
    kind = jax.devices()[0].device_kind
    return next((name for name, core in GENERATIONS.items() if kind in core.kinds), None)
