"""`spectra plan`: a config on named accelerators: memory, what crosses devices, the bound on its speed, the cost."""

import time
from collections.abc import Sequence

from spectra_jax.errors import UserError
from spectra_jax.plan import buffers, estimate, hlo
from spectra_jax.plan.program import compiled, in_gib, lowered, memory
from spectra_jax.plan.roofline import Bound, bound
from spectra_jax.plan.search import Candidate, search
from spectra_jax.plan.topology import GIB, Topology, devices, parse
from spectra_jax.schema import Config
from spectra_jax.sharding import abstract_mesh, make_mesh

LARGEST = 6  # arrays that are listed
BEST = 8  # candidates of a search that are listed


def plan(config: Config, names: Sequence[str], *, compile: bool = False, price: float = 0.0) -> str:
    """Text for each topology.

    Args:
      compile: compile the step as well: a minute or two each.
      price: of a chip for an hour; 0: not said.

    Raises:
      UserError: an unknown topology, a mesh or batch that does not divide, a step that does not fit (the message has
        the nearest that does), a GPU to compile for.
    """
    return "\n\n".join("\n".join(_one(config, parse(name), compile, price)) for name in names)


def searched(config: Config, names: Sequence[str], *, compile: bool = False, price: float = 0.0) -> str:
    """For each topology the best changes of the config by `search`, and the plan of the first; compiled, if asked,
    where the first that fits is planned.

    Raises:
      UserError: an unknown topology; nothing fits.
    """
    return "\n\n".join("\n".join(_search(config, parse(name), compile, price)) for name in names)


def _one(config: Config, topology: Topology, compile: bool, price: float) -> list[str]:
    family = topology.family
    mesh = make_mesh(config, devices(topology)) if compile else abstract_mesh(config, topology.devices)
    shape = " x ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    per_device = config.data.batch // config.train.accumulate / (mesh.shape["slice"] * mesh.shape["data"])
    lines = [
        f"{config.family} {config.name} on {topology.name}: {topology.chips} chips, {mesh.size} devices ({shape})",
        f"  batch      {config.data.batch} x {config.data.T} tokens, {per_device:g} sequences of a microbatch on a "
        f"device, remat {config.model.remat}, attention {config.model.attention}",
    ]
    started, sizes = time.perf_counter(), tuple(mesh.shape.values())
    step = lowered(config, mesh, "tpu" if family.libtpu else "cuda")
    if compile:
        try:
            program = compiled(step, family.memory)
        except UserError as error:
            raise UserError(f"{error}. {_nearest(config, topology)}") from error
        lines.append(f"  compiled   by libtpu in {time.perf_counter() - started:.0f} s")
        text, found = program.as_text(), memory(program)
        lines.append(
            f"  memory     {in_gib(found.arguments)} GiB of state and batch + {in_gib(found.temporary)} of temporaries "
            f"= {in_gib(found.peak)} a device of {family.memory:g}"
        )
        lines += _arrays(text) + _crossing(text)
        if topology.slices > 1:
            lines.append("             (loops that libtpu unrolls, as it does on several slices, count one turn)")
    else:
        least, peak = estimate.state(config, sizes), estimate.peak(config, sizes)
        lines.append(f"  lowered    in {time.perf_counter() - started:.1f} s: shapes and shardings fit")
        lines.append(f"  memory     {in_gib(least)} GiB of state, about {in_gib(peak)} in all by arithmetic, of "
                     f"{family.memory:g} a device (--compile tells; --config.model.attention of kernels is assumed)")
        if least > family.memory * GIB:
            raise UserError(
                f"the state alone is {in_gib(least)} GiB a device and {topology.name} has {family.memory:g}. "
                f"{_nearest(config, topology)}"
            )
    return lines + _speed(config, bound(config, mesh, topology), price)


def _nearest(config: Config, topology: Topology) -> str:
    best = search(config, topology)[0]
    return f"By arithmetic this would fit, at about {in_gib(best.memory)} GiB: {' '.join(best.changes)}"


def _search(config: Config, topology: Topology, compile: bool, price: float) -> list[str]:
    found = search(config, topology)
    lines = [f"{config.family} {config.name} on {topology.name}: {len(found)} plans fit by arithmetic; the best:",
             "  slice x data x model   batch  parts  remat   GiB  ms/step  MFU <=  tokens/s/chip  limit"]
    for one in found[:BEST]:
        c, b = one.config, one.bound
        mesh = " x ".join(map(str, one.shape))
        lines.append(
            f"  {mesh:<20} {c.data.batch:>7} {c.train.accumulate:>6}  {c.model.remat:<5} {in_gib(one.memory):>6} "
            f"{b.step * 1e3:>8,.0f}  {b.mfu:>6.0%} {b.tokens_per_second / b.chips:>14,.0f}  {b.limit}"
        )
    best, planned = _first_that_fits(found, topology, compile, price)
    return [*lines, f"  changes    {' '.join(best.changes) or 'none'}", *planned]


def _first_that_fits(
    found: list[Candidate], topology: Topology, compile: bool, price: float
) -> tuple[Candidate, list[str]]:
    """The first is taken on trust where nothing is compiled."""
    for one in found[:BEST]:
        try:
            return one, _one(one.config, topology, compile, price)
        except UserError as error:
            refused = error
    raise refused


def _arrays(text: str) -> list[str]:
    lines = ["  largest    arrays made, MB on a device, and where (they need not live together)"]
    for one in buffers.largest(text, LARGEST):
        lines.append(f"             {one.bytes / 1e6:>9,.1f}  {one.shape:<26} {one.source}")
    return lines


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
        f"  bound      {b.step * 1e3:,.0f} ms a step by {b.limit} (compute {b.compute * 1e3:,.0f}, links "
        f"{b.links * 1e3:,.0f}, network {b.network * 1e3:,.0f}): MFU at most {b.mfu:.0%}, "
        f"{b.tokens_per_second:,.0f} tokens/s, {b.tokens_per_second / b.chips:,.0f} a chip",
        f"  time       at least {days:,.1f} days and {hours:,.0f} chip-hours for {tokens / 1e9:,.0f}B tokens",
    ]
    if price:
        lines[-1] += f", {hours * price:,.0f} at {price:g} a chip-hour"
    return lines
