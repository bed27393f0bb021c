"""Which mesh, remat and microbatch are fastest by the bound, among those that fit by the estimate."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from spectra_jax.errors import UserError
from spectra_jax.plan import estimate
from spectra_jax.plan.roofline import Bound, bound
from spectra_jax.plan.topology import GIB, Topology
from spectra_jax.schema import Config
from spectra_jax.sharding import AXES, abstract_mesh, checked_shape

SPARE = 0.9  # of a device's memory may be used by the estimate, which errs by about that


@dataclass(frozen=True)
class Candidate:
    """A config that fits, the changes that make it, and what to expect of it."""

    config: Config
    changes: tuple[str, ...]  # overrides of the command line
    shape: tuple[int, int, int]
    memory: int  # bytes on a device, about
    bound: Bound


def search(config: Config, topology: Topology) -> list[Candidate]:
    """All that fit, the fastest first; of those within some 3 % the one that says least to other devices.

    Tried are 1 to 8 devices that share a matrix, replicas across slices (or nodes of GPUs, if asked by the config),
    every remat, microbatches of every size, the accelerator's own attention. A batch that a mesh does not divide gives
    way to the nearest that it does.

    Raises:
      UserError: nothing fits; the message says by how much.
    """
    found = list(_candidates(config, topology))
    if not found:
        raise UserError(f"config.model does not divide over the {topology.devices} devices of {topology.name}")
    room = SPARE * topology.family.memory * GIB
    fit = [one for one in found if one.memory <= room]
    if not fit:
        least = min(found, key=lambda one: one.memory)
        raise UserError(
            f"{config.name} fits in no way on {topology.name}: the least is about {least.memory / GIB:.1f} GiB a "
            f"device ({' '.join(least.changes)}) and {SPARE:.0%} of {topology.family.memory:g} may be used; use at "
            f"least {-(-least.memory * topology.chips // int(room))} chips"
        )
    fastest = max(one.bound.tokens_per_second for one in fit)
    return sorted(fit, key=lambda one: (
        -round(33 * one.bound.tokens_per_second / fastest), one.bound.links + one.bound.network, one.memory
    ))


def _candidates(config: Config, topology: Topology) -> Iterator[Candidate]:
    slices = topology.slices if topology.family.libtpu else config.mesh.slice
    attention = "splash" if topology.family.libtpu else "cudnn"
    for model in (1, 2, 4, 8):
        data, rest = divmod(topology.devices, slices * model)
        if rest or not data:
            continue
        replicas = slices * data
        each = max(round(config.data.batch / replicas), 1)  # sequences
        for accumulate in (parts for parts in range(1, each + 1) if each % parts == 0):
            for remat in ("none", "dots", "full"):
                changes = {
                    ("mesh", "slice"): slices, ("mesh", "data"): data, ("mesh", "model"): model,
                    ("data", "batch"): each * replicas, ("train", "accumulate"): accumulate,
                    ("model", "remat"): remat, ("model", "attention"): attention,
                }
                if one := _candidate(config, changes, topology):
                    yield one


def _candidate(config: Config, changes: dict[tuple[str, str], object], topology: Topology) -> Candidate | None:
    """None where the model does not divide."""
    new, said = config, []
    for (section, key), value in changes.items():
        if getattr(getattr(config, section), key) != value:
            new = replace(new, **{section: replace(getattr(new, section), **{key: value})})
            said.append(f"--config.{section}.{key}={value}")
    sizes = dict(zip(AXES, (new.mesh.slice, new.mesh.data, new.mesh.model)))
    m = new.model
    if m.D % sizes["data"] or any(size % sizes["model"] for size in (m.N, m.K, m.F, m.V)):
        return None
    shape = checked_shape(new, topology.devices)
    mesh = abstract_mesh(new, topology.devices)
    return Candidate(new, tuple(said), shape, estimate.peak(new, shape), bound(new, mesh, topology))
