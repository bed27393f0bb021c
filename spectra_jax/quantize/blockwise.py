"""Block-wise data types: every weight to the nearest of a table's values, times the block's largest magnitude.

The types of bitsandbytes, with its codes, and of the k-bit scaling laws (arXiv 2212.09720), by `config.quantize.grid`:

  linear    equal steps from -1 to 1, any width
  dynamic   the tree of arXiv 2110.02861: b-1 decades with 1, 2, 4, ... values each, any width
  quantile  the quantiles of the matrix: as many weights at every value, any width
  fp4       one sign, two exponent bits, one of the fraction; code = the bits
  fp8       the same with five and two
  nf4       quantiles of the normal distribution, with 0 (QLoRA, arXiv 2305.14314, appendix E)
  af4       a rival of NF4 for blocks of 64 weights (arXiv 2306.06965)

A block is `group` inputs of one output, as in bitsandbytes where the block divides the inputs; 64 is its default.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spectra_jax.errors import UserError, one_of
from spectra_jax.quantize.grids import group_of
from spectra_jax.schema import Quantize
from spectra_jax.sharding import gathered
from spectra_jax.weights.codebook import ByteScales, Codebook, nearest_codes, normalised

# Published values, not computed: the formula that NF4 was made by leaves its last digits open.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by the bits of the code; the upper eight codes are negative

FIXED_BITS = {"fp4": 4, "nf4": 4, "af4": 4, "fp8": 8}
TYPES = ("linear", "dynamic", "quantile", *FIXED_BITS)


def blockwise(
    w: Float[Array, "m n"], h: Array | None, q: Quantize, name: str = "matrix", *, double: bool = False
) -> Codebook:
    """The quantized matrix (in, out); `h` is not looked at.

    Args:
      double: scales are stored in 8 bits themselves, instead of in `q.scale_dtype`.

    Raises:
      UserError: an unknown type, a width or a block that it does not have, or blocks that do not divide the inputs.
    """
    kind, group = one_of(q.grid, TYPES, "config.quantize.grid"), group_of(w.shape[0], q, name)
    if q.bits != FIXED_BITS.get(kind, q.bits):
        raise UserError(
            f"config.quantize.grid={kind} has {FIXED_BITS[kind]} bits, not config.quantize.bits={q.bits}; "
            f"use --config.quantize.bits={FIXED_BITS[kind]}, or linear, dynamic or quantile, which have any"
        )
    if kind == "af4" and group != 64:
        raise UserError(
            f"config.quantize.grid=af4 is made for blocks of 64 weights, not of {group} inputs of {name}; "
            "use --config.quantize.group=64, or nf4"
        )
    return _blockwise(w, q, group, double)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _blockwise(w: Float[Array, "m n"], q: Quantize, group: int, double: bool) -> Codebook:
    values = quantiles(w, q.bits) if q.grid == "quantile" else jnp.asarray(table(q.grid, q.bits))
    blocks = w.reshape(-1, group, w.shape[1])
    scales = jnp.max(jnp.abs(blocks), axis=1).astype("float32" if double else q.scale_dtype)
    codes = nearest_codes(normalised(blocks, scales[:, None].astype(w.dtype)), values).reshape(w.shape)
    if double:
        scales = ByteScales.of(scales, jnp.asarray(table("dynamic", 8)))
    return Codebook(codes, scales, values, bits=q.bits)


def table(kind: str, bits: int) -> Float[np.ndarray, "V"]:
    """The 2^bits values of a type that does not depend on the matrix, within [-1, 1]."""
    if kind == "linear":
        # An odd number of values, so that 0 is among them; it stands twice.
        values = [*np.linspace(-1, 1, 2**bits - 1), 0.0]
    elif kind == "dynamic":
        # Of the decade that ends at 10^-k the middles of 2^(bits-2-k) equal parts of its upper nine tenths.
        decades = [(10.0**-k, 2 ** (bits - 2 - k)) for k in range(bits - 1)]
        upper = np.concatenate([top * (0.1 + 0.9 * (np.arange(n) + 0.5) / n) for top, n in decades])
        values = [*-upper, 0.0, *upper, 1.0]
    elif kind == "fp8":
        values = _floats(exponent_bits=5, fraction_bits=2)
    elif kind == "fp4":
        return np.float32([*FP4, *(-value for value in FP4)]) / np.float32(max(FP4))
    else:
        values = {"nf4": NF4, "af4": AF4}[kind]
    return np.sort(np.float32(values))


def _floats(exponent_bits: int, fraction_bits: int) -> Float[np.ndarray, "V"]:
    """All values of a small floating-point type over the largest; the lowest exponent is that of subnormals."""
    exponent, fraction = np.arange(2**exponent_bits)[:, None], np.arange(2**fraction_bits)[None] / 2**fraction_bits
    # As bitsandbytes has it: exponents fall, and subnormals are a quarter of what IEEE 754 would make them.
    bias = 2 ** (exponent_bits - 1)
    values = np.where(exponent == 0, fraction * 2.0**-bias, (1 + fraction) * 2.0 ** (bias + 1 - exponent)).ravel()
    return np.concatenate([-values, values]) / values.max()


def quantiles(w: Float[Array, "m n"], bits: int) -> Float[Array, "V"]:
    """The (i + 1/2)/N quantiles of all weights, i from 0 to N-1 = 2^bits - 2, over the largest of them; and 0."""
    count = 2**bits - 1
    found = jnp.quantile(gathered(w).reshape(-1), (jnp.arange(count) + 0.5) / count)
    largest = jnp.max(jnp.abs(found))
    return jnp.sort(jnp.append(found / jnp.where(largest == 0, 1, largest), 0.0)).astype(jnp.float32)
