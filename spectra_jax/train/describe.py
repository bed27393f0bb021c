"""What a run is about to do, in the lines that stand above its progress."""

from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from spectra_jax import hardware
from spectra_jax.hardware import Peak
from spectra_jax.model.parameters import count
from spectra_jax.model.transformer import compute_dtype
from spectra_jax.schema import Config, Model
from spectra_jax.train.optimizer import state_bytes


def matmul_parameters(m: Model) -> int:
    """Weights that multiply every token: the matrices of the blocks and the head."""
    return count(m).linear + m.V * m.D


def flops_per_token(config: Config) -> int:
    """Training FLOPs per token, as `hardware.flops_per_token` counts them."""
    m = config.model
    return hardware.flops_per_token(matmul_params=matmul_parameters(m), L=m.L, N=m.scoring, H=m.H, T=config.data.T)


def describe(config: Config, mesh: Mesh, peak: Peak, workdir: Path, start: int, parameters: PyTree) -> str:
    """Model, schedule and place of a run that goes on after step `start`; its devices, MFU and parameters."""
    m, data, counts = config.model, config.data, count(config.model)
    shape = " x ".join(f"{n} {axis}" for axis, n in mesh.shape.items())
    where = f"resuming after step {start}" if start else f"from {config.train.start or 'scratch'}"
    return (
        f"{config.family} {config.name}: {counts.total:,} parameters ({counts.linear:,} in {m.weight} "
        f"matrices), {config.steps:,} steps of {data.batch} x {data.T} tokens, {where}, into {workdir}\n"
        f"{mesh.size} device(s) ({shape}), compute {compute_dtype(m)}, {flops_per_token(config) / 1e6:,.1f} MFLOP per "
        f"token, peak: {peak.source}\n{mfu_formula(config, peak)}\n{optimizer_line(config)}\n"
        f"{parameter_table(parameters)}"
    )


def optimizer_line(config: Config) -> str:
    """The optimizer and the room of its state, on all devices together."""
    size = state_bytes(config.model, config.optimizer)
    bits = 8 * size / count(config.model).total
    return f"optimizer {config.optimizer.name}: {size / 1e6:,.2f} MB of state, {bits:.2f} bits per parameter"


def mfu_formula(config: Config, peak: Peak) -> str:
    """How the MFU of this run follows from its tokens per second, with the numbers."""
    if peak.value is None:
        return "no peak, no MFU"
    m = config.model
    return (
        f"MFU = tokens/s x (6 P + 12 L N H T) / peak = tokens/s x (6 x {matmul_parameters(m):,} + 12 x {m.L} x "
        f"{m.scoring} x {m.H} x {config.data.T:,}) / {peak.value / 1e12:,.4g} TFLOP/s"
    )


def parameter_table(parameters: PyTree[jax.Array | jax.ShapeDtypeStruct]) -> str:
    """One line per kind of parameter, layers stacked: shape, dtype, spec, how many, and the room on one device.

    Args:
      parameters: arrays or their shapes, each with its sharding.
    """
    rows = [("parameters", "shape", "dtype", "sharding", "count", "MB/device")]
    counts, sizes = [], []
    for path, leaf in jax.tree.leaves_with_path(parameters):
        part = jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        counts.append(leaf.size)
        sizes.append(part.size * part.dtype.itemsize / 1e6)
        axes = ", ".join(str(axis) for axis in leaf.sharding.spec)
        rows.append((
            jax.tree_util.keystr(path, simple=True, separator="/"), " x ".join(map(str, leaf.shape)), leaf.dtype.name,
            f"P({axes})", f"{leaf.size:,}", f"{sizes[-1]:,.2f}",
        ))
    rows.append(("all", "", "", "", f"{sum(counts):,}", f"{sum(sizes):,.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    form = [str.ljust] * 4 + [str.rjust] * 2
    return "\n".join("  ".join(f(text, n) for f, text, n in zip(form, row, widths)) for row in rows)
