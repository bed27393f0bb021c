"""Accelerators by name: TPU slices, whose devices libtpu compiles for without having them, and nodes of GPUs."""

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


@dataclass(frozen=True)
class Family:
    """One kind of accelerator, by what a JAX device of it has. Rates are in bytes a second."""

    kind: str  # jax's `device_kind`
    memory: float  # GiB that a program may use; less than the chip's where libtpu says so
    bandwidth: float  # of that memory
    inbound: float  # from all neighbours in its slice or node together
    network: float  # to another slice or node
    sides: int  # numbers in the name of a slice: the axes of a torus, or 1, the GPUs of a node
    width: int = 128  # of a matrix unit: heads of 64 fill half of it
    efficiency: float = 0.85  # of the peak, that large products reach; assumed
    cores: int = 1  # of a device
    per_chip: int = 1  # devices
    libtpu: str = ""  # its name there; GPUs have none
    config: str = "default"

    @property
    def flops(self) -> float:
        """Peak bf16 FLOP/s of a device."""
        return hardware.table_peak(self.kind, self.cores).value


# TPUs. Memory and bandwidth: Cloud TPU documentation; 15.75 of 16 GiB is what the compiler's own refusal says for v5e,
# the others are whole. Links, two ways along every side of the torus: "How to scale your model"
# (jax-ml.github.io/scaling-book). Network: recalled, 200 Gbit/s for a host of 8 chips.
# GPUs. Data sheets of the SXM boards, in GiB: NVLink one way; one 400 Gbit/s adapter a GPU. Large products stay further
# below the peak than on TPUs; 0.7 is assumed. Nothing here was measured.
FAMILIES = {
    "v4": Family("TPU v4", 32.0, 1228e9, 6 * 4.5e10, 3.1e9, 3, cores=2, libtpu="v4", config="megacore"),
    "v5e": Family("TPU v5 lite", 15.75, 819e9, 4 * 4.5e10, 3.1e9, 2, libtpu="v5e"),
    "v5p": Family("TPU v5", 95.0, 2765e9, 6 * 9e10, 3.1e9, 3, cores=2, libtpu="v5", config="megacore"),
    "v6e": Family("TPU v6 lite", 32.0, 1640e9, 4 * 9e10, 3.1e9, 2, width=256, libtpu="v6e"),
    "tpu7x": Family("TPU7x", 96.0, 7380e9 / 2, 6 * 9e10 / 2, 3.1e9 / 2, 3, width=256, per_chip=2, libtpu="tpu7x"),
    "h100": Family("NVIDIA H100", 79.0, 3350e9, 450e9, 50e9, 1, width=64, efficiency=0.7),
    "h200": Family("NVIDIA H200", 139.0, 4800e9, 450e9, 50e9, 1, width=64, efficiency=0.7),
    "b200": Family("NVIDIA B200", 178.0, 7700e9, 900e9, 50e9, 1, width=64, efficiency=0.7),
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
    """Some slices of one shape, in chips; or nodes with so many GPUs."""

    name: str
    family: Family
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """All of them."""
        return self.slices * prod(self.shape)

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.family.per_chip


def parse(name: str) -> Topology:
    """FAMILY:AxB[xC], an accelerator type such as v5p-128, GPU:N for a node; each with *N for N slices or nodes.

    Raises:
      UserError: none of these; the message lists what there is.
    """
    text, star, count = name.partition("*")
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){0,2})", TYPES.get(text, text))
    if not found or found[1] not in FAMILIES or (star and not (count.isdecimal() and int(count))):
        tpus = ", ".join(name for name, family in FAMILIES.items() if family.libtpu)
        gpus = ", ".join(name for name, family in FAMILIES.items() if not family.libtpu)
        raise UserError(
            f"--topology={name!r} is not known: give FAMILY:AxB[xC] with a TPU of {tpus}, one of {', '.join(TYPES)}, "
            f"or GPU:8 with a GPU of {gpus}; *2 after it makes two slices or nodes"
        )
    family, shape = FAMILIES[found[1]], tuple(int(size) for size in found[2].split("x"))
    if 0 in shape or len(shape) != family.sides:
        what = f"a slice of {found[1]} has {family.sides} sides" if family.libtpu else "a node has a number of GPUs"
        raise UserError(f"--topology={name!r}: {what}, each at least 1")
    return Topology(name, family, shape, int(count) if star else 1)


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of TPU slices that are not here, to compile for.

    Raises:
      UserError: GPUs; libtpu is not installed, or has no such slice.
    """
    if not topology.family.libtpu:
        raise UserError(f"{topology.name}: to compile for a GPU takes one; without --compile its step is lowered")
    if find_spec("libtpu") is None:
        raise UserError('compiling for a TPU takes libtpu, which is not installed: pip install "jax[tpu]"')
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    family, shape = topology.family, topology.shape
    torus = all(size % 4 == 0 for size in shape)  # a slice of whole cubes of 4 is closed to rings
    wrap = tuple(torus if family.sides == 3 else size == 16 for size in shape) + (False,) * (3 - len(shape))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{family.libtpu}:{'x'.join(map(str, shape))}",
            chip_config_name=family.config, chips_per_host_bounds=(2, 2, 1), num_slices=topology.slices, wrap=wrap,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name!r}: libtpu has no such slice: {error}") from error
    return list(found.devices)
