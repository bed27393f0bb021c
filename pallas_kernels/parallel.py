"""Tensor parallelism: every device of a mesh axis has a part of the matrix, in the layout of its own kernel.

Kernels pad and permute, so cutting their layouts would be cutting tiles. Instead each device converts its own part of
the codes, and the parts stand side by side in one more dim: arrays of `Packed` are (*L, parts, ...), one part a device,
and `m` and `n` are those of a part.

    cut = 1, the outputs: every device has all of x and gives its part of y
    cut = 0, the inputs:  every device has its part of x; the sum over devices is y
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int8

from pallas_kernels import api
from pallas_kernels.packing import Packed, pack


def shard(
    codes: Int8[Array, "*L m n"], scales: Float[Array, "*L g s"], cut: int, axis: str, implementation: str
) -> Packed:
    """The parts of a matrix, for `sharded_matmul`. Under a mesh (`jax.set_mesh`), one that is sharded already included.

    Args:
      scales: as in `Packed`, of the whole matrix.
      cut: 0 for the inputs, 1 for the outputs.
      axis: of the mesh.

    Raises:
      ValueError: inputs, outputs or scales that do not divide, or an implementation that there is not.
    """
    parts, lead = jax.sharding.get_abstract_mesh().shape[axis], (None,) * (codes.ndim - 2)
    if codes.shape[cut - 2] % parts:
        raise ValueError(f"{codes.shape[cut - 2]} {('inputs', 'outputs')[cut]} do not divide into {parts} parts")
    shared = scales.shape[cut - 2]
    if parts % shared == 0:
        scales = jnp.repeat(scales, parts // shared, axis=cut - 2, total_repeat_length=parts)
    elif shared % parts:
        raise ValueError(f"{shared} scales along the {('inputs', 'outputs')[cut]} do not divide into {parts} parts")
    spec = P(*lead, *((axis, None) if cut == 0 else (None, axis)))

    def local(codes: Array, scales: Array) -> Packed:
        packed = api.prepare(Packed(pack(codes), scales, *codes.shape[-2:]), implementation)
        return jax.tree.map(lambda x: jnp.expand_dims(x, len(lead)), packed)

    run = jax.shard_map(local, in_specs=(spec, spec), out_specs=P(*lead, axis), check_vma=False)
    return run(_at(codes, spec), _at(scales, spec))


def sharded_matmul(
    x: Float[Array, "M m"], weights: Packed, cut: int, axis: str, implementation: str, rows: str | tuple | None = None
) -> Float[Array, "M n"]:
    """`api.ternary_matmul` of every device's part, differentiable with respect to x.

    Args:
      weights: from `shard`, without leading dims but that of the parts.
      rows: mesh axes that the rows of x are sharded over.

    Returns:
      Sharded over `rows`, and over `axis` along n if the outputs are cut.
    """
    product = partial(api.ternary_matmul, implementation=implementation)

    def local(x: Array, weights: Packed) -> Array:
        y = product(x, jax.tree.map(lambda part: part[0], weights))
        return jax.lax.psum(y, axis) if cut == 0 else y

    x_spec, y_spec = (P(rows, axis), P(rows, None)) if cut == 0 else (P(rows, None), P(rows, axis))
    # Without vma: a kernel's result does not say over which axes it varies.
    run = jax.shard_map(local, in_specs=(x_spec, P(axis)), out_specs=y_spec, check_vma=False)
    return run(_at(x, x_spec), jax.tree.map(lambda part: _at(part, P(axis)), weights))


def _at(x: Array, spec: P) -> Array:
    """Moved there: on meshes of explicit axes nothing moves by itself."""
    explicit = all(kind == jax.sharding.AxisType.Explicit for kind in jax.sharding.get_abstract_mesh().axis_types)
    return jax.sharding.reshard(x, spec) if explicit else x
