"""Where arrays live: the mesh, and the one table from logical dims to mesh axes.

Mesh axes: "slice" (replicas across slices), "data" (batch and fully sharded parameters), "model" (tensor parallel).
"""

from dataclasses import dataclass, replace
from math import prod

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spectra_jax.errors import UserError
from spectra_jax.schema import Config, Mesh

AXES = ("slice", "data", "model")
TYPES = (jax.sharding.AxisType.Explicit,) * len(AXES)


@dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical dim. `None` means replicated.

    `embed` is D as a dim of a weight (sharded: FSDP), `act` is D as a dim of an activation (not sharded).
    """

    batch: tuple[str, ...] | str | None = ("slice", "data")
    time: str | None = None
    act: str | None = None
    embed: str | None = "data"
    heads: str | None = "model"
    ffn: str | None = "model"
    vocab: str | None = "model"

    def __call__(self, *dims: str | None) -> P | None:
        """The spec of an array with these logical dims; None outside a mesh, so that a notebook needs none.

        Raises:
          ValueError: two dims of one array fall on the same mesh axis.
        """
        axes = [getattr(self, dim) if dim else None for dim in dims]
        used = [a for axis in axes for a in _axes(axis)]
        if len(used) != len(set(used)):
            raise ValueError(f"dims {dims} map to mesh axes {axes}: an axis can shard one dim of an array only")
        return P(*axes) if in_mesh() else None

    def without(self, dim: str, other: str) -> "Rules":
        """Rules that keep `dim` off the mesh axes of `other`."""
        own, taken = _axes(getattr(self, dim)), _axes(getattr(self, other))
        return replace(self, **{dim: tuple(axis for axis in own if axis not in taken)})


def _axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def in_mesh() -> bool:
    """Whether a mesh is set."""
    return not jax.sharding.get_abstract_mesh().empty


def gathered(x: jax.Array, spec: P | None = None) -> jax.Array:
    """`x` moved to `spec` (by default a copy on every device); itself outside a mesh. This line communicates."""
    return jax.sharding.reshard(x, P() if spec is None else spec) if in_mesh() else x


def parts(axes: str | tuple[str, ...] | None) -> int:
    """Into how many parts a dim with these axes of the mesh is divided."""
    return prod(jax.sharding.get_abstract_mesh().shape[name] for name in _axes(axes))


def mesh_shape(wanted: Mesh, devices: int) -> tuple[int, int, int]:
    """Devices per axis, with one -1 filled in.

    Raises:
      UserError: the product is not the number of devices.
    """
    sizes = [wanted.slice, wanted.data, wanted.model]
    text = f"config.mesh.slice={wanted.slice}, data={wanted.data}, model={wanted.model}"
    if sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise UserError(f"{text}: each must be at least 1, and only one may be -1 (the rest of the devices)")
    rest = prod(n for n in sizes if n != -1)
    if devices % rest or (-1 not in sizes and rest != devices):
        fit = [n for n in range(1, devices + 1) if devices % n == 0]
        raise UserError(f"{text}: the axes do not make up {devices} devices; use divisors of it, {fit}, or one -1")
    return tuple(devices // rest if n == -1 else n for n in sizes)


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of a run, after checking that the batch and the model divide over it.

    Raises:
      UserError: devices, batch or a dim of the model do not divide, or slices are not on the axis of slices.
    """
    devices = jax.devices() if devices is None else devices
    return _in_hardware_order(checked_shape(config, len(devices)), devices)


def abstract_mesh(config: Config, devices: int) -> jax.sharding.AbstractMesh:
    """The mesh on so many devices that are not here, to lower for.

    Raises:
      UserError: as `make_mesh`.
    """
    return jax.sharding.AbstractMesh(checked_shape(config, devices), AXES, axis_types=TYPES)


def checked_shape(config: Config, devices: int) -> tuple[int, int, int]:
    """Devices per axis.

    Raises:
      UserError: devices, batch or a dim of the model do not divide.
    """
    shape = dict(zip(AXES, mesh_shape(config.mesh, devices)))
    m, replicas = config.model, shape["slice"] * shape["data"]
    micro = config.data.batch // config.train.accumulate
    if micro % replicas:
        raise UserError(
            f"config.data.batch={config.data.batch} in {config.train.accumulate} microbatches of {micro} is not "
            f"divisible by the data axes ({shape['slice']} x {shape['data']}); use "
            f"{-(-micro // replicas) * replicas * config.train.accumulate} or another --config.mesh.data"
        )
    for axis, dims in (
        ("data", {"D": m.D}),
        ("model", {"N": m.N, "K": m.K, "F": m.F, "V": m.V}),
    ):
        for name, size in dims.items():
            if size % shape[axis]:
                raise UserError(
                    f"config.model.{name}={size} is not divisible by the {axis} axis ({shape[axis]}); "
                    f"change --config.mesh.{axis} or config.model.{name}"
                )
    return tuple(shape.values())


def _in_hardware_order(shape: tuple[int, int, int], devices: list[jax.Device]) -> jax.sharding.Mesh:
    """Neighbours in the mesh are neighbours on the torus; between slices only the axis "slice" crosses.

    In any other order XLA makes an all-reduce of an all-gather at 64 chips.
    """
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if shape[0] % slices:
        raise UserError(
            f"the devices are in {slices} slices and config.mesh.slice={shape[0]}; use --config.mesh.slice={slices}, "
            "so that only gradients cross the network between them"
        )
    within, between, split = (shape[0] // slices, *shape[1:]), (slices, 1, 1), {"allow_split_physical_axes": True}
    if slices > 1:
        order = mesh_utils.create_hybrid_device_mesh(within, between, devices, **split)
    else:
        order = mesh_utils.create_device_mesh(shape, devices, **split)
    return jax.sharding.Mesh(order, AXES, axis_types=TYPES)


def batch_sharding(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rules: Rules = Rules()
) -> NamedSharding:
    """How a batch of token records (B, T+1) is spread."""
    return NamedSharding(mesh, P(rules.batch, rules.time))
