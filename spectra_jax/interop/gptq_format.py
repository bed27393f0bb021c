"""The packed form of GPTQ checkpoints that transformers reads: AutoGPTQ's, version 1 ("checkpoint_format": "gptq").

Of each matrix (in m, out n), with codes counted from 0:
  qweight  (m bits/32, n) int32: the codes of an output one after the other, lowest bits first, across word borders
  qzeros   (G, n bits/32) int32: the zeros of a group in the same way, each less 1
  scales   (G, n) float16
  g_idx    (m,) int32: the group of each input
"""

from typing import Any

import numpy as np
from jaxtyping import Int, Shaped, UInt32

from spectra_jax.errors import UserError
from spectra_jax.schema import Quantize
from spectra_jax.weights.grid import Grid

BITS = (2, 3, 4, 8)  # what transformers accepts
WORD = 32


def packed(grid: Grid, name: str) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The four tensors of one matrix.

    Raises:
      UserError: a width, a size or a dtype of scales that the format does not have.
    """
    (m, n), bits = grid.codes.shape, grid.bits
    if bits not in BITS or m * bits % WORD or n * bits % WORD or grid.scales.dtype != np.float16 or grid.tokens8:
        activations = "8-bit" if grid.tokens8 else "float"
        raise UserError(
            f"{name} ({m} x {n}) has {bits} bits, scales of {grid.scales.dtype} and {activations} activations; the "
            f"GPTQ format has {', '.join(map(str, BITS))} bits, whole words of {WORD} bits, scales of "
            "float16 (--config.quantize.scale_dtype) and float activations: export with --to=hf"
        )
    codes, groups = np.asarray(grid.codes, np.int32), grid.scales.shape[0]
    if grid.zeros is None:
        middle = 2 ** (bits - 1)
        codes, zeros = codes + middle, np.full((groups, n), middle, np.int32)
    else:
        zeros = np.asarray(grid.zeros, np.int32)
    of_input = np.arange(m) // (m // groups) if grid.groups is None else np.asarray(grid.groups)
    return {
        "qweight": pack(codes, bits).view(np.int32),
        # A zero of 0 becomes the highest value, which readers add 1 to and cut.
        "qzeros": np.ascontiguousarray(pack((zeros.T - 1) % 2**bits, bits).T).view(np.int32),
        "scales": np.asarray(grid.scales),
        "g_idx": of_input.astype(np.int32),
    }


def pack(values: Int[np.ndarray, "m n"], bits: int) -> UInt32[np.ndarray, "w n"]:
    """Numbers below 2^bits down each column as one stream of bits, lowest first, in words of 32."""
    stream = (values[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    words = stream.reshape(-1, WORD, values.shape[1]).astype(np.uint32)
    return np.sum(words << np.arange(WORD, dtype=np.uint32)[None, :, None], axis=1, dtype=np.uint32)


def config_of(grid: Grid, q: Quantize) -> dict[str, Any]:
    """What config.json says under "quantization_config"; `grid` is any of the matrices, of one layer or of all."""
    groups, m = grid.scales.shape[-2], grid.codes.shape[-2]
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": grid.bits,
        "group_size": m // groups if groups > 1 else -1, "desc_act": grid.groups is not None,
        "static_groups": q.static_groups, "sym": grid.zeros is None,
        "damp_percent": q.damp, "true_sequential": q.true_sequential,
    }
