"""TPU slices by name: the devices that libtpu compiles for without having them, and what one of them can do."""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

import jax
from jax.experimental import topologies

from spectra_jax import hardware
from spectra_jax.errors import UserError

GIB = 2**30
DCN = 3.1e9  # bytes a second that a chip sends to another slice; recalled: 200 Gbit/s for a host of 8 chips


@dataclass(frozen=True)
class Family:
    """One kind of TPU, by what a JAX device of it has. Bandwidths are one way."""

    libtpu: str  # its name there
    kind: str  # jax's `device_kind`
    cores: int  # of a device
    per_chip: int  # devices
    hbm: float  # GiB that a program may use; less than the chip's where libtpu says so
    link: float  # bytes a second, of one link of the torus
    axes: int  # of the torus
    config: str = "default"

    @property
    def flops(self) -> float:
        """Peak bf16 FLOP/s of a device."""
        return hardware.table_peak(self.kind, self.cores).value


# Memory: Cloud TPU documentation; 15.75 of 16 GiB is what the compiler's own refusal says for v5e,
# the others are whole. Links: "How to scale your model" (jax-ml.github.io/scaling-book), not measured.
FAMILIES = {
    "v4": Family("v4", "TPU v4", 2, 1, 32.0, 4.5e10, 3, "megacore"),
    "v5e": Family("v5e", "TPU v5 lite", 1, 1, 15.75, 4.5e10, 2),
    "v5p": Family("v5", "TPU v5", 2, 1, 95.0, 9e10, 3, "megacore"),
    "v6e": Family("v6e", "TPU v6 lite", 1, 1, 32.0, 9e10, 2),
    "tpu7x": Family("tpu7x", "TPU7x", 1, 2, 96.0, 9e10, 3),
}
# Accelerator types as they are ordered. v4 and v5p count cores.
TYPES = {
    "v4-128": "v4:4x4x4", "v5e-16": "v5e:4x4", "v5e-64": "v5e:8x8", "v5e-256": "v5e:16x16", "v5p-32": "v5p:2x2x4",
    "v5p-128": "v5p:4x4x4", "v5p-1024": "v5p:8x8x8", "v6e-16": "v6e:4x4", "v6e-64": "v6e:8x8", "v6e-256": "v6e:16x16",
    "tpu7x-32": "tpu7x:2x2x4", "tpu7x-128": "tpu7x:4x4x4",
}
# Where there is no TPU libtpu asks the cloud for minutes what machine this is, locks out a second process, complains.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_ACCELERATOR_TYPE": "v5litepod-1"}


@dataclass(frozen=True)
class Topology:
    """Some slices of one shape, in chips."""

    name: str
    family: Family
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """All of them."""
        return self.slices * prod(self.shape)


def parse(name: str) -> Topology:
    """FAMILY:AxB[xC], an accelerator type such as v5p-128, either with *N for N slices.

    Raises:
      UserError: none of these; the message lists what there is.
    """
    text, star, count = name.partition("*")
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", TYPES.get(text, text))
    if not found or found[1] not in FAMILIES or (star and not (count.isdecimal() and int(count))):
        raise UserError(
            f"--topology={name!r} is no TPU topology: give FAMILY:AxB[xC] with a family of {', '.join(FAMILIES)}, or "
            f"one of {', '.join(TYPES)}; *2 after it makes two slices"
        )
    family, shape = FAMILIES[found[1]], tuple(int(size) for size in found[2].split("x"))
    if 0 in shape or len(shape) != family.axes:
        raise UserError(f"--topology={name!r}: a slice of {found[1]} has {family.axes} sides, each at least 1")
    return Topology(name, family, shape, int(count) if star else 1)


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of slices that are not here, to compile for.

    Raises:
      UserError: libtpu is not installed, or has no such slice.
    """
    if find_spec("libtpu") is None:
        raise UserError('compiling for a TPU takes libtpu, which is not installed: pip install "jax[tpu]"')
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    family, shape = topology.family, topology.shape
    torus = all(size % 4 == 0 for size in shape)  # a slice of whole cubes of 4 is closed to rings
    wrap = tuple(torus if family.axes == 3 else size == 16 for size in shape) + (False,) * (3 - len(shape))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{family.libtpu}:{'x'.join(map(str, shape))}",
            chip_config_name=family.config, chips_per_host_bounds=(2, 2, 1), num_slices=topology.slices, wrap=wrap,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name!r}: libtpu has no such slice: {error}") from error
    return list(found.devices)
