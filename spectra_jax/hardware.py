"""Peak arithmetic rates of chips, and the model FLOPs utilisation (MFU) that is read against them.

An MFU is only as good as its denominator, so every peak carries where it came from, and a chip that
is not in the table has no MFU rather than a guessed one.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# Dense bf16 FLOP/s of one TensorCore, keyed by jax's `device_kind`. A JAX device is one core (v2,
# v3, tpu7x) or a whole chip of one or two cores (megacore v4, v5p); `device.num_cores` tells which,
# so cores are what a table can hold. Chip totals are those of the Cloud TPU documentation; the v2
# row is recalled.
_TPU_CORE = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12 / 2,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12 / 2,
    "TPU v5p": 459e12 / 2,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
}

# Dense 16-bit tensor-core FLOP/s of one GPU (half of the "with sparsity" figure where a vendor
# prints that one), by the first pattern found in `device_kind`. Recalled from the data sheets.
# Whole words, so that H20 or GB200, other chips, are not taken for their namesakes.
_GPU = (
    (r"\bB200\b", 2250e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH100\b.*\bPCIe\b", 756e12),
    (r"\bH100\b.*\bNVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bV100\b.*\bPCIE\b", 112e12),  # fp16: V100 has no bf16
    (r"\bV100S?\b", 125e12),
    (r"\bMI300X\b", 1307e12),
)

_SIDE = 1024  # of the square matmuls timed on a CPU: 2.1 GFLOP, some 15 ms on two good cores
_BUDGET = 0.6  # seconds of timing; compilation and one warm-up come on top


@dataclass(frozen=True)
class Peak:
    """A peak rate in FLOP/s and where it comes from; value None: unknown, `source` says why."""

    value: float | None
    source: str


def peak_flops(device: jax.Device, dtype: DTypeLike = jnp.bfloat16) -> Peak:
    """Peak dense matmul FLOP/s of one JAX device (a chip, or a core where JAX shows cores).

    Accelerators: the chip's 16-bit peak from a table, whatever `dtype` is, because that is what
    utilisations are quoted against; `source` warns when the run computes in another dtype.
    CPU: measured in `dtype`, in about a second the first time and from memory afterwards.
    """
    if device.platform == "cpu":
        return _measured(device, jnp.dtype(dtype).name)
    peak = table_peak(device.device_kind, getattr(device, "num_cores", 1))
    name = jnp.dtype(dtype).name
    if peak.value is not None and name not in ("bfloat16", "float16"):
        return Peak(peak.value, f"{peak.source}; a 16-bit peak, though the run computes in {name}")
    return peak


def table_peak(device_kind: str, cores: int = 1) -> Peak:
    """Peak of a JAX device by its `device_kind` and TensorCore count (1 for anything but a TPU)."""
    if device_kind in _TPU_CORE:
        source = f"{device_kind}, {cores} core(s): bf16 peak of the Cloud TPU documentation"
        return Peak(cores * _TPU_CORE[device_kind], source)
    if "MIG" in device_kind:
        return Peak(None, f"{device_kind!r} is a slice of a GPU: no peak in the table")
    for pattern, value in _GPU:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return Peak(value, f"{device_kind}: dense 16-bit data-sheet peak")
    return Peak(None, f"no peak is known for device kind {device_kind!r}")


def total_peak(devices: Sequence[jax.Device], dtype: DTypeLike = jnp.bfloat16) -> Peak:
    """Peak FLOP/s of all `devices` together; None if one of them is unknown.

    CPU devices of one process share the same cores, so they count once per process.
    """
    if not devices:
        return Peak(None, "no devices")
    if devices[0].platform == "cpu":
        own = {device.process_index: device for device in devices}
        local = next((d for d in devices if d.process_index == jax.process_index()), None)
        if local is None:
            return Peak(None, "none of the CPU devices belongs to this process")
        peak = peak_flops(local, dtype)
        return Peak(len(own) * peak.value, f"{len(own)} process(es) x {peak.source}")
    peaks = [peak_flops(device, dtype) for device in devices]
    unknown = next((peak for peak in peaks if peak.value is None), None)
    if unknown is not None:
        return unknown
    return Peak(sum(peak.value for peak in peaks), f"{len(devices)} device(s) x {peaks[0].source}")


@lru_cache(maxsize=None)
def _measured(device: jax.Device, dtype: str) -> Peak:
    """Best rate of a few square matmuls; not the mean, a peak is what nothing disturbed."""
    # A caller's mesh would spread the operands over all its devices; a mesh of one device keeps the
    # measurement on that device wherever this is called from.
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=[device])):
        # An explicit transfer, so that it passes a caller's transfer guard.
        x = jax.device_put(np.ones((_SIDE, _SIDE), jnp.dtype(dtype)), device)
        matmul = jax.jit(jnp.matmul).lower(x, x).compile()
        matmul(x, x).block_until_ready()
        best, runs, start = float("inf"), 0, time.perf_counter()
        while time.perf_counter() - start < _BUDGET and runs < 20:
            begin = time.perf_counter()
            matmul(x, x).block_until_ready()
            best, runs = min(best, time.perf_counter() - begin), runs + 1
    source = f"measured on this CPU: best of {runs} {dtype} matmuls of {_SIDE} x {_SIDE}"
    return Peak(2 * _SIDE**3 / best, source)


def flops_per_token(*, matmul_params: int, L: int, N: int, H: int, T: int) -> int:
    """Training FLOPs (forward and backward, no recompute) per token: 6 P + 12 L N H T.

    `matmul_params` P counts every weight that multiplies the token (head included; the embedding is
    a lookup, so not). L layers, N query heads, H head dim, T context length. The attention term
    counts the full T x T scores: the half a causal mask removes is NOT subtracted, so that figures
    compare with published ones. Source: PaLM (arXiv 2204.02311), appendix B.
    """
    return 6 * matmul_params + 12 * L * N * H * T


def mfu(
    tokens_per_second: float, flops_per_token: int | float, peak_total: float | None
) -> float | None:
    """Model FLOPs utilisation as a fraction: useful FLOP/s over `peak_total` FLOP/s of all devices.

    None where the peak is unknown. Source: PaLM (arXiv 2204.02311), appendix B.
    """
    return None if peak_total is None else tokens_per_second * flops_per_token / peak_total
