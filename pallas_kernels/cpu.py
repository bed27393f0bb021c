"""The product on a CPU by a kernel in C++, `cpu.cc`: matrices stay at 2 bits, so decode runs at the speed of memory.

Activations are rounded to whole numbers of two 8-bit digits, as in `reference.digits`: each is off by 2^-14.9 of its
row's largest at most, and so an output by that times the sum of |scale code| over its column. Scales along the inputs
multiply x first; with scales per group each group has its own largest. `digits=1` rounds to one digit per 1024 inputs:
half the work, and 2^-7.9 instead of 2^-14.9.

Sums are exact, so all paths of the kernel (AVX-512 VNNI, AVX2, plain C++) give the same bits. Long prompts go through
XLA's int8 product instead, where that is faster.
"""

import ctypes
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8, UInt32

from pallas_kernels import build, reference
from pallas_kernels.packing import Packed, expand

LAYOUT = "cpu"
SPAN, LINE, OUTPUTS = 256, 64, 4  # inputs of a span, the bytes they take, the outputs whose spans lie side by side
LARGEST_BLOCK = 65536  # inputs that share a step: their sum must fit int32
# Rows of x from which XLA's int8 product of unpacked codes is faster: with AMX, which XLA uses, and on the plain path.
CROSSOVER = {"amx": 64, "plain": 4}


def convert(weights: Packed) -> Packed:
    """Canonical weights in spans, (*L, ceil(n/4), 256 ceil(m/256)) bytes; `cpu.cc` says which bits are which."""
    return replace(weights, data=_spans(weights.codes()), layout=LAYOUT)


@jax.jit
def _spans(codes: Int8[Array, "*L m n"]) -> UInt8[Array, "*L o b"]:
    *lead, m, n = codes.shape
    filled = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, -m % SPAN), (0, -n % OUTPUTS)])
    rows = jnp.swapaxes(filled, -1, -2).reshape(*lead, -(-n // OUTPUTS), OUTPUTS, -1, 4, LINE)
    a, b, c, d = ((rows[..., j, :] + 2).astype(jnp.uint8) << 2 * j for j in range(4))
    return jnp.swapaxes(a | b | c | d, -2, -3).reshape(*lead, -(-n // OUTPUTS), -1)


def codes(weights: Packed) -> Int8[Array, "*L m n"]:
    """The codes."""
    return jnp.swapaxes(_rows(weights), -1, -2)


def _rows(weights: Packed) -> Int8[Array, "*L n m"]:
    """The codes, a row per output. The two steps are 5 times as fast apart as in the one loop XLA makes of them."""
    *lead, outputs, _ = weights.data.shape
    spans = jnp.swapaxes(weights.data.reshape(*lead, outputs, -1, OUTPUTS, LINE), -2, -3)
    spans = jax.lax.optimization_barrier(spans)
    quarters = [(spans >> 2 * j & 3).astype(jnp.int8) - jnp.int8(2) for j in range(4)]
    return jnp.concatenate(quarters, -1).reshape(*lead, outputs * OUTPUTS, -1)[..., : weights.n, : weights.m]


def refuses(x: jax.ShapeDtypeStruct, weights: Packed) -> str | None:
    """Another device, no compiler, or what the kernel does not compute."""
    g, s = weights.scales.shape[-2:]
    block = weights.m // g if s > 1 else weights.m
    if jax.default_backend() != "cpu":
        return f"it computes on CPUs and the default device is a {jax.default_backend()}"
    if weights.data.ndim != 2:
        return f"the weights are a stack, {weights.data.shape}: it takes one layer's"
    if g > 1 and s > 1 and block % SPAN:
        return f"scales of groups of {block} inputs: groups are whole multiples of {SPAN}"
    if block > LARGEST_BLOCK:
        return f"{block} inputs share a step, whose sum would pass int32: {LARGEST_BLOCK} at most"
    library = _library()
    return library if isinstance(library, str) else None


def matmul(x: Float[Array, "M m"], weights: Packed, *, digits: int = 2, path: str = "") -> Float[Array, "M n"]:
    """In the dtype of x.

    Args:
      digits: of 8 bits per activation, 1 or 2.
      path: one of `paths`, or "xla" for XLA's int8 product; by default the fastest here.

    Raises:
      ValueError: there is no library.
    """
    if not path and digits == 2 and x.shape[0] >= _crossover(weights):
        path = "xla"
    y = _by_xla(x, weights) if path == "xla" else _by_kernel(x, weights, digits, path)
    return y.astype(x.dtype)


def _by_kernel(x: Float[Array, "M m"], weights: Packed, digits: int, path: str) -> Float[Array, "M n"]:
    _loaded()
    call = jax.ffi.ffi_call("spectra_ternary", jax.ShapeDtypeStruct((x.shape[0], weights.n), jnp.float32))
    return call(x.astype(jnp.float32), weights.data, weights.scales, digits=np.int64(digits), path=path)


def _by_xla(x: Float[Array, "M m"], weights: Packed) -> Float[Array, "M n"]:
    """The same whole numbers, all high digits above all low ones."""
    along_inputs = weights.scales.shape[0] > 1
    scale = expand(weights.scales, weights.m, weights.n)
    high, low, step = reference.digits(x.astype(jnp.float32) * scale.T if along_inputs else x)
    both = jax.lax.dot_general(
        jnp.concatenate([high, low]), _rows(weights), (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    y = (128 * both[: x.shape[0]] + both[x.shape[0] :]).astype(jnp.float32) * step
    return y if along_inputs else y * scale


def _crossover(weights: Packed) -> int:
    """Rows of x from which XLA is faster."""
    g, s = weights.scales.shape
    if g > 1 and s > 1:
        return sys.maxsize  # XLA would take a product per group
    return CROSSOVER["amx"] if _loaded().SpectraHasAmx() else CROSSOVER.get(paths()[0], sys.maxsize)


def paths() -> list[str]:
    """The paths of the kernel that this processor has, the fastest first.

    Raises:
      ValueError: there is no library.
    """
    return _loaded().SpectraPaths().decode().split()


def read(buffer: UInt8[Array, "b"]) -> UInt32[Array, "1"]:
    """Reads bytes with the kernel's threads, to measure bandwidth; gives the exclusive or of their words."""
    _loaded()
    return jax.ffi.ffi_call("spectra_read", jax.ShapeDtypeStruct((1,), jnp.uint32))(buffer)


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise ValueError(f"there is no CPU kernel: {library}")
    return library


@cache
def _library() -> ctypes.CDLL | str:
    """The library, made known to XLA; or why there is none."""
    try:
        library = ctypes.CDLL(str(build.library()))
    except (build.Unavailable, OSError) as e:
        return str(e)
    library.SpectraPaths.restype = ctypes.c_char_p
    library.SpectraHasAmx.restype = ctypes.c_bool
    for target, function in {"ternary": library.SpectraTernary, "read": library.SpectraRead}.items():
        jax.ffi.register_ffi_target(f"spectra_{target}", jax.ffi.pycapsule(function), platform="cpu")
    return library
