"""Ternary matrices in memory: codes -1, 0, 1 at 2 or 1.6 bits, and the scales that multiply them.

Canonical storage packs neighbouring inputs of one output, so that a matrix (m, n) becomes rows of n bytes:

    2 bits, "2bit", (ceil(m/4), n)                     8 bits of 5 codes, "5trit", (ceil(m/5), n)
    byte [r, j], bits 7 6 | 5 4 | 3 2 | 1 0            byte [r, j] = ceil(256/243 (81 t0 + 27 t1 + 9 t2 + 3 t3 + t4))
    input      4r+3 | 4r+2 | 4r+1 | 4r                 t_k = code of input 5r+k, plus 1
    code in two's complement: 00 0, 01 1, 11 -1        code k again: ((byte 3^k mod 256) 3) >> 8, minus 1

Inputs past the end are zeros. A kernel converts to its own layout once, when a model is loaded. Leading dims (stacked
layers) may stand before all of this.
"""

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8

CODES_PER_BYTE = {"2bit": 4, "5trit": 5}
POWERS = np.array([81, 27, 9, 3, 1])


def pack(codes: Int8[Array, "*L m n"], layout: str = "2bit") -> UInt8[Array, "*L r n"]:
    """The canonical storage of codes.

    Raises:
      ValueError: a code outside -1, 0, 1 (not looked for under jit), or an unknown layout.
    """
    per_byte = _per_byte(layout)
    if not isinstance(codes, jax.core.Tracer):
        low, high = (int(f(codes)) for f in (jnp.min, jnp.max)) if codes.size else (0, 0)
        if low < -1 or high > 1:
            raise ValueError(f"ternary codes are -1, 0 and 1; these go from {low} to {high}: quantize to codes first")
    m = codes.shape[-2]
    filled = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, -m % per_byte), (0, 0)])
    groups = filled.reshape(*codes.shape[:-2], -1, per_byte, codes.shape[-1])
    if layout == "2bit":
        shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
        bits = (groups.astype(jnp.uint8) & 3) << _like(shifts, groups)
        return jnp.sum(bits, axis=-2, dtype=jnp.uint8)
    value = jnp.sum((groups + 1) * _like(jnp.asarray(POWERS, jnp.int32)[:, None], groups), axis=-2)
    return ((value * 256 + 242) // 243).astype(jnp.uint8)


def unpack(data: UInt8[Array, "*L r n"], m: int, layout: str = "2bit") -> Int8[Array, "*L m n"]:
    """The codes of canonical storage.

    Raises:
      ValueError: `data` has not the rows that `m` inputs take, or an unknown layout.
    """
    per_byte = _per_byte(layout)
    if data.shape[-2] != -(-m // per_byte):
        raise ValueError(
            f"{m} inputs at {per_byte} codes a byte take {-(-m // per_byte)} rows; there are {data.shape[-2]}: "
            "the file is cut off, or it is of another matrix"
        )
    groups = data[..., None, :]
    if layout == "2bit":
        # Up to the top of the byte and down again: the shift down copies the sign.
        up = _like(jnp.array([6, 4, 2, 0], jnp.uint8)[:, None], groups)
        codes = jax.lax.bitcast_convert_type(groups << up, jnp.int8) >> jnp.int8(6)
    else:
        turned = groups * _like(jnp.asarray(POWERS[::-1], jnp.uint8)[:, None], groups)  # modulo 256
        codes = (turned.astype(jnp.int32) * 3 >> 8).astype(jnp.int8) - jnp.int8(1)
    return codes.reshape(*data.shape[:-2], -1, data.shape[-1])[..., :m, :]


def _per_byte(layout: str) -> int:
    if layout not in CODES_PER_BYTE:
        raise ValueError(f"layout {layout!r} is not canonical; there are {', '.join(CODES_PER_BYTE)}")
    return CODES_PER_BYTE[layout]


def _like(values: Array, groups: Array) -> Array:
    """(k, 1) with as many leading dims as `groups`."""
    return values.reshape((1,) * (groups.ndim - 2) + values.shape)


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A ternary matrix (m, n) ready for `api.ternary_matmul`: `scale * code`, a scale per block of the matrix.

    `scales` (g, s) has one value per m/g inputs and n/s outputs: (1, 1) for one scale, (S, 1) and (1, S) for shards
    along the inputs and the outputs, (1, n) per output, (m/group, n) per group.
    """

    data: Array
    scales: Float[Array, "*L g s"]
    m: int = field(metadata={"static": True})
    n: int = field(metadata={"static": True})
    layout: str = field(default="2bit", metadata={"static": True})

    def codes(self) -> Int8[Array, "*L m n"]:
        """The codes, of canonical storage."""
        return unpack(self.data, self.m, self.layout)

    def dequantize(self) -> Float[Array, "*L m n"]:
        """The matrix in float32, from canonical storage."""
        return self.codes().astype(jnp.float32) * expand(self.scales, self.m, self.n)


def expand(scales: Float[Array, "*L g s"], m: int, n: int) -> Float[Array, "*L a b"]:
    """Scales repeated to (m or 1, n or 1): a dim with one scale is left for broadcasting."""
    g, s = scales.shape[-2:]
    if (g > 1 and m % g) or (s > 1 and n % s):
        raise ValueError(f"scales {(g, s)} do not divide a matrix of {m} inputs and {n} outputs")
    if g > 1:
        scales = jnp.repeat(scales, m // g, axis=-2, total_repeat_length=m)
    return jnp.repeat(scales, n // s, axis=-1, total_repeat_length=n) if s > 1 else scales
