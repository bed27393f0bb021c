"""`spectra plan`: a config on named TPU slices: memory, what crosses devices, the bound on its speed, the cost."""

import time
from collections.abc import Sequence

from jax.sharding import Mesh

from spectra_jax.errors import UserError
from spectra_jax.model.parameters import count
from spectra_jax.plan import hlo
from spectra_jax.plan.program import compiled, in_gib, lowered, memory
from spectra_jax.plan.roofline import EFFICIENCY, Bound, bound
from spectra_jax.plan.topology import GIB, Topology, devices, parse
from spectra_jax.schema import Config
from spectra_jax.sharding import make_mesh


def plan(config: Config, names: Sequence[str], *, compile: bool = False, price: float = 0.0) -> str:
    """Text for each topology.

    Args:
      compile: compile the step as well: a minute or two each.
      price: of a chip for an hour; 0: not said.

    Raises:
      UserError: an unknown topology, a mesh or batch that does not divide, a step that does not fit, an attention or
        kernel that the chip does not have.
    """
    return "\n\n".join("\n".join(_one(config, parse(name), compile, price)) for name in names)


def _one(config: Config, topology: Topology, compile: bool, price: float) -> list[str]:
    mesh, family = make_mesh(config, devices(topology)), topology.family
    shape = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    per_device = config.data.batch // config.train.accumulate / (mesh.shape["slice"] * mesh.shape["data"])
    lines = [
        f"{config.family} {config.name} on {topology.name}: {topology.chips} chips, {mesh.size} devices ({shape})",
        f"  batch      {config.data.batch} x {config.data.T} tokens, {per_device:g} sequences of a microbatch on a "
        f"device, remat {config.model.remat}, attention {config.model.attention}",
    ]
    started = time.perf_counter()
    step = lowered(config, mesh)
    lines.append(f"  lowered    in {time.perf_counter() - started:.1f} s: shapes and shardings fit")
    if compile:
        started = time.perf_counter()
        program = compiled(step, family.hbm)
        lines[-1] = f"  compiled   by libtpu in {time.perf_counter() - started:.0f} s"
        found = memory(program)
        lines.append(
            f"  memory     {in_gib(found.arguments)} GiB of state and batch + "
            f"{in_gib(found.results + found.temporary)} of temporaries = {in_gib(found.total)} a device of "
            f"{family.hbm:g}"
        )
        lines += _crossing(program.as_text())
        if topology.slices > 1:
            lines.append("             (loops that libtpu unrolls, as it does on several slices, count one turn)")
    else:
        least = _state_bytes(config, mesh)
        lines.append(f"  memory     {in_gib(least)} GiB of state of {family.hbm:g} on a device, temporaries not known: "
                     "--compile tells")
        if least > family.hbm * GIB:
            chips = -(-least * topology.chips // int(family.hbm * GIB))
            raise UserError(
                f"the state alone is {in_gib(least)} GiB a device and {topology.name} has {family.hbm:g}; use at least "
                f"{chips} chips, or --config.mesh.data=-1, which spreads it over all devices"
            )
    return lines + _speed(config, bound(config, mesh, topology), price)


def _state_bytes(config: Config, mesh: Mesh) -> int:
    """Parameters and two moments in float32, divided over data and model axes."""
    return 12 * count(config.model).total // (mesh.shape["data"] * mesh.shape["model"])


def _crossing(text: str) -> list[str]:
    found = hlo.collectives(text)
    lines = ["  crossing   kind, dtype, times a step, MB of results on a device"]
    for (kind, dtype), (times, size) in hlo.by_kind(found).items():
        lines.append(f"             {kind:<19} {dtype:<5} {times:>7,} {size / 1e6:>11,.1f}")
    total, started = sum(one.total for one in found), sum(one.total for one in found if one.started)
    if total:
        lines.append(f"             {started / total:.0%} of the bytes by instructions that other work can go beside")
    return lines


def _speed(config: Config, b: Bound, price: float) -> list[str]:
    tokens = config.steps * config.tokens_per_step
    days = b.days(tokens)
    hours = days * 24 * b.chips
    lines = [
        f"  bound      {b.step * 1e3:,.0f} ms a step by {b.limit} (compute {b.compute * 1e3:,.0f} at {EFFICIENCY:.0%} "
        f"of the peak, links {b.links * 1e3:,.0f}, network {b.network * 1e3:,.0f}): MFU at most {b.mfu:.0%}, "
        f"{b.tokens_per_second:,.0f} tokens/s, {b.tokens_per_second / b.chips:,.0f} a chip",
        f"  time       at least {days:,.1f} days and {hours:,.0f} chip-hours for {tokens / 1e9:,.0f}B tokens",
    ]
    if price:
        lines[-1] += f", {hours * price:,.0f} at {price:g} a chip-hour"
    return lines
