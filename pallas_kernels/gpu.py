"""Ternary product on NVIDIA GPUs of compute capability 8.0 and newer, in Pallas on Triton.

Activations become two int8 digits (`reference.digits`: 16 bits in two products of 8), and int8 tensor cores multiply
them by the codes with sums in int32, exactly. So a weight costs 7/16 of an integer instruction: four planes of a 32-bit
word, three shifts and four ands for 16 weights. An H200 issues 16.7e12 such lane operations a second while its memory
delivers 17.2e12 weights at 2 bits; a decode into bf16 takes 15/16.

Layout "gpu", (m/256, n, 64) bytes: canonical bytes, turned so that what one program loads in one step lies together.

    byte [t, j, c], bits 7 6 | 5 4 | 3 2 | 1 0      plane p = 0..3: (byte << 2p) & 0xC0 is 64 times the code of
    input 256t+4c  +3 | +2 | +1 | +0                input 256t + 4c + 3 - p, as an int8: the sign is on top

The planes multiply their own 64 inputs each, which `_digits` puts side by side, so no code is ever moved. Inputs are
filled up to 256 and outputs to 128 with zeros.

A product is three launches: the digits, the kernel, and one XLA fusion that sums the partial results of the split
inputs and scales them. XLA sums rather than atomics: the order is fixed, and the fusion takes along what follows.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from pallas_kernels.packing import Packed, expand, pack, unpack
from pallas_kernels.reference import LARGEST

LAYOUT = "gpu"
BYTES = 64  # of one output in a step
INPUTS = 4 * BYTES
OUTPUTS = 128  # a matrix is filled up to a multiple of it
SLICE = 1024  # inputs that one program turns into digits

# Not measured yet. Up to this many rows the kernel decodes weights in every product; above it they are unpacked once.
CROSSOVER = 256
# Not measured yet. Programs that keep an H200 busy: two for each of its 132 multiprocessors.
PROGRAMS = 264
# Not measured yet. Weights from which on a program has 256 outputs, for half the traffic of activations.
WIDE = 2**26


@dataclass(frozen=True)
class Block:
    """What one program computes: `bm` rows and `bn` outputs over 1/`splits` of the inputs.

    `weights_first`: sums lie (outputs, rows). Hopper then takes codes from registers and activations from shared
    memory (wgmma); the other way around it would write the codes to shared memory first.
    """

    bm: int
    bn: int
    splits: int
    warps: int
    stages: int
    weights_first: bool

    @property
    def shared_bytes(self) -> int:
        """Shared memory: `stages` steps of codes and of digits, bn x 64 and 4 planes x 2 digits x bm x 64."""
        return self.stages * (self.bn * BYTES + 8 * self.bm * BYTES)

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold sums: 2 digits x bm x bn, of 255 in all."""
        return 2 * self.bm * self.bn // (32 * self.warps)


def choose(M: int, m: int, n: int) -> Block:
    """The block for M rows, m inputs and n outputs.

    Shared memory is held to 96 KiB, which every GPU since 8.0 has; sums to 128 registers of a thread. Inputs are split
    until there are `PROGRAMS` programs. At few rows the tensor cores want mma.sync, which has no minimum of 64 rows.
    """
    bm = min(max(8, pl.next_power_of_2(M)), 64)
    bn = 2 * OUTPUTS if bm <= 16 and m * n >= WIDE and n % (2 * OUTPUTS) == 0 else OUTPUTS
    warps = 4
    per_step = Block(bm, bn, 1, warps, 1, False).shared_bytes
    stages = min(4, max(2, 96 * 1024 // per_step))
    tiles = -(-m // INPUTS)
    programs = -(-n // bn) * -(-M // bm)
    per = -(-tiles // min(tiles, -(-PROGRAMS // programs)))
    return Block(bm, bn, -(-tiles // per), warps, stages, weights_first=bm > 8)


def convert(weights: Packed) -> Packed:
    """Canonical weights in layout "gpu"."""
    data = weights.data if weights.layout == "2bit" else pack(weights.codes())
    rows, n = data.shape[-2:]
    data = jnp.pad(data, [(0, 0)] * (data.ndim - 2) + [(0, -rows % BYTES), (0, -n % OUTPUTS)])
    data = data.reshape(*data.shape[:-2], -1, BYTES, data.shape[-1]).swapaxes(-1, -2)
    return replace(weights, data=data, layout=LAYOUT)


def codes(weights: Packed) -> Int8[Array, "*L m n"]:
    """The codes again."""
    data = weights.data.swapaxes(-1, -2)
    data = data.reshape(*data.shape[:-3], -1, data.shape[-1])
    return unpack(data, 4 * data.shape[-2])[..., : weights.m, : weights.n]


def refuses(x: jax.ShapeDtypeStruct, weights: Packed) -> str | None:
    """Anything but a GPU of compute capability 8.0 or newer, scales per group and output, float64."""
    device, (g, s) = jax.local_devices()[0], weights.scales.shape[-2:]
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, and the default device is {device.platform}"
    if float(device.compute_capability) < 8:
        return f"it needs int8 tensor cores of compute capability 8.0, and this GPU has {device.compute_capability}"
    if g > 1 and s > 1:
        return f"scales {(g, s)} of groups and outputs multiply neither x nor y; the kernel takes (g, 1) or (1, s)"
    if x.dtype == jnp.float64:
        return "x is float64, and its digits keep 16 bits of it"
    return None


def matmul(
    x: Float[Array, "M m"], weights: Packed, *, block: Block | None = None, interpret: bool = False
) -> Float[Array, "M n"]:
    """x times the matrix, in the dtype of x.

    Args:
      block: by default `choose`; above `CROSSOVER` rows none, and XLA multiplies by the unpacked matrix.
      interpret: run the kernel in Pallas' interpreter, on any device: for tests.
    """
    M, n, dtype = x.shape[0], weights.n, x.dtype
    if weights.scales.shape[-2] > 1:
        x = x.astype(jnp.float32) * expand(weights.scales, weights.m, 1).T
        scale = jnp.ones((1, 1))
    else:
        scale = expand(weights.scales, 1, n)
    if block is None and M > CROSSOVER:
        matrix = _unpacked(weights, dtype)
        contracted = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(x.astype(dtype), matrix, contracted, preferred_element_type=jnp.float32)
        return (y * scale).astype(dtype)
    tiles, filled = weights.data.shape[:2]
    block = block or choose(M, weights.m, filled)
    q, step = _digits(x, block.bm, tiles, interpret)
    y = _partial_sums(q, weights.data, M, block, interpret)
    return (jnp.sum(y, axis=0)[:M, :n] * (step / 64) * scale).astype(dtype)


def _unpacked(weights: Packed, dtype: DTypeLike) -> Float[Array, "n m"]:
    """The codes, inputs along rows as they lie in memory."""
    up = jnp.array([6, 4, 2, 0], jnp.uint8)
    c = jax.lax.bitcast_convert_type(weights.data[..., None] << up.reshape(1, 1, 1, 4), jnp.int8) >> jnp.int8(6)
    c = c.transpose(1, 0, 2, 3).reshape(weights.data.shape[1], -1)
    return c[: weights.n, : weights.m].astype(dtype)


def _digits(x: Float[Array, "M m"], bm: int, tiles: int, interpret: bool) -> tuple[Array, Array]:
    """Digits (4 planes, row blocks, 2 x bm, 64 tiles) int8, first the high ones of a block, and steps (M, 1).

    One launch: every program finds the largest of its row for itself.
    """
    M, m = x.shape
    blocks, width = -(-M // bm), tiles * BYTES
    slices = -(-4 * width // SLICE)
    q, step = pl.pallas_call(
        partial(_digits_kernel, m=m),
        grid=(M, slices),
        in_specs=[pl.BlockSpec((None, m), lambda r, j: (r, 0))],
        out_specs=[
            pl.BlockSpec((4, None, 2, None, SLICE // 4), lambda r, j: (0, r // bm, 0, r % bm, j)),
            pl.BlockSpec((None, 1), lambda r, j: (r, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((4, blocks, 2, bm, slices * SLICE // 4), jnp.int8),
            jax.ShapeDtypeStruct((M, 1), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=8 if m > 8192 else 4, num_stages=1),
        interpret=interpret,
        name="ternary_digits",
    )(x)
    return q.reshape(4, blocks, 2 * bm, -1), step


def _digits_kernel(x_ref, q_ref, step_ref, *, m: int):
    k = jnp.arange(pl.next_power_of_2(m))
    row = plt.load(x_ref.at[k], mask=k < m, other=0).astype(jnp.float32)
    step = jnp.max(jnp.abs(row)) / LARGEST
    step_ref[0] = step
    inverse = jnp.where(step > np.finfo(np.float32).tiny, 1 / step, 0.0)
    for p in range(4):
        k = pl.program_id(1) * SLICE + 4 * jnp.arange(SLICE // 4) + (3 - p)
        x = plt.load(x_ref.at[k], mask=k < m, other=0).astype(jnp.float32)
        # 1.5 x 2^23 leaves no bits for a fraction: the sum's last bits are x, rounded, as a whole number.
        shifted = x * inverse + np.float32(1.5 * 2**23)
        whole = jax.lax.bitcast_convert_type(shifted, jnp.int32) - np.int32(0x4B400000)
        high = (whole + 64) >> 7
        q_ref[p, 0] = high.astype(jnp.int8)
        q_ref[p, 1] = (whole - (high << 7)).astype(jnp.int8)


def _partial_sums(q: Array, data: Array, M: int, block: Block, interpret: bool) -> Float[Array, "splits rows n"]:
    """64 x (128 high + low) times the codes, for each part of the inputs."""
    tiles, n = data.shape[:2]
    rows = q.shape[1] * block.bm
    return pl.pallas_call(
        partial(_kernel, M=M, block=block, tiles=tiles, interpret=interpret),
        grid=(q.shape[1], n // block.bn, block.splits),  # programs with the same codes run side by side
        in_specs=[
            pl.BlockSpec((4, None, *q.shape[2:]), lambda r, j, s: (0, r, 0, 0)),
            pl.BlockSpec((tiles, block.bn, BYTES), lambda r, j, s: (0, j, 0)),
        ],
        out_specs=pl.BlockSpec((None, block.bm, block.bn), lambda r, j, s: (s, r, j)),
        out_shape=jax.ShapeDtypeStruct((block.splits, rows, n), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=interpret,
        name="ternary_product",
    )(q, data)


def _kernel(q_ref, w_ref, o_ref, *, M: int, block: Block, tiles: int, interpret: bool):
    per = -(-tiles // block.splits)
    start = pl.program_id(2) * per
    # Rows past M are not read: at M = 1 they would be as much traffic as the codes.
    row = pl.program_id(0) * block.bm + jnp.arange(2 * block.bm) % block.bm
    mask = None if M % block.bm == 0 else jnp.broadcast_to(row[:, None] < M, (2 * block.bm, BYTES))

    other = None if mask is None else 0

    def step(t, sums):
        w = w_ref[t]
        for p in range(4):
            x = plt.load(q_ref.at[jnp.int32(p), :, pl.ds(t * BYTES, BYTES)], mask=mask, other=other)
            plane = _plane(w, p, interpret)
            pair = (plane, x) if block.weights_first else (x, plane)
            sums += jax.lax.dot_general(*pair, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return sums

    shape = (2 * block.bm, block.bn)
    zeros = jnp.zeros(shape[::-1] if block.weights_first else shape, jnp.int32)
    sums = jax.lax.fori_loop(start, jnp.minimum(start + per, tiles), step, zeros)
    high, low = jax.lax.split(sums, (block.bm, block.bm), axis=1 if block.weights_first else 0)
    y = high.astype(jnp.float32) * 128 + low.astype(jnp.float32)
    o_ref[...] = y.T if block.weights_first else y


def _plane(w: Array, p: int, interpret: bool) -> Array:
    """Codes times 64 from bits 7-2p and 6-2p of every byte."""
    if interpret:  # which knows no assembly
        return jax.lax.bitcast_convert_type((w << jnp.uint8(2 * p)) & jnp.uint8(0xC0), jnp.int8)
    return plt.elementwise_inline_asm(
        PLANES[p],
        args=[w],
        constraints="=r,r",
        pack=4,  # bytes in a register: one instruction for four, where Triton would take each apart
        result_shape_dtypes=[jax.ShapeDtypeStruct(w.shape, jnp.int8)],
    )[0]


# What a shift brings in from the byte below is masked away.
PLANES = ("and.b32 $0, $1, 0xC0C0C0C0;",) + tuple(
    f"shl.b32 $0, $1, {2 * p}; and.b32 $0, $0, 0xC0C0C0C0;" for p in (1, 2, 3)
)
