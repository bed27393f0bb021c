"""Ternary and binary matrices as the packed product's kernels want them: made when a model is loaded to run."""

from functools import partial
from typing import no_type_check

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from pallas_kernels import api
from spectra_jax.errors import UserError
from spectra_jax.sharding import gathered, in_mesh
from spectra_jax.weights.form import Form, form, is_form, static
from spectra_jax.weights.frozen import Frozen


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Prepared(Form):
    """A matrix in the layout of one implementation. It is never stored."""

    matrix: api.Packed
    implementation: str = static()

    def product(self, x: Float[Array, "r m"], spec: P | None = None) -> Float[Array, "r n"]:
        """By the implementation, the whole of it on every device: kernels know nothing of meshes."""
        run = partial(api.ternary_matmul, implementation=self.implementation)
        if in_mesh():
            run = jax.shard_map(run, in_specs=(P(), P()), out_specs=P())
        return gathered(run(gathered(x), jax.tree.map(gathered, self.matrix)), spec)


def prepare(parameters: PyTree, implementation: str | None = None, *, rows: int = 1) -> tuple[PyTree, str]:
    """The parameters with every `Frozen` matrix prepared, and the implementation.

    Args:
      implementation: of `pallas_kernels.api`; by default the first that serves `rows` rows here.

    Raises:
      UserError: there is no such matrix, or the implementation cannot serve one; the message says why.
    """
    matrices = [node for node in jax.tree.leaves(parameters, is_leaf=is_form) if isinstance(node, Frozen)]
    if not matrices:
        raise UserError("packed products are of ternary and binary models; this one has no such matrix")
    try:
        of_one_layer = jax.eval_shape(lambda node: jax.tree.map(lambda x: x[0], canonical(node)), matrices[0])
        x = jax.ShapeDtypeStruct((rows, of_one_layer.m), "float32")
        if implementation is None:
            implementation, _ = api.choose(x, of_one_layer)
        api.check(x, of_one_layer, implementation)
        convert = jax.jit(partial(_prepared, implementation=implementation))
        ready = jax.tree.map(lambda x: convert(x) if isinstance(x, Frozen) else x, parameters, is_leaf=is_form)
    except ValueError as error:
        raise UserError(f"{error}; use another implementation, or the unpacked weights") from error
    return ready, implementation


def canonical(node: Frozen) -> api.Packed:
    """The matrix in the canonical storage of the kernels."""
    m, n = node.codes.shape[-2:]
    scales = node.scales[..., :, None] if node.axis == 0 else node.scales[..., None, :]
    return api.Packed(api.pack(gathered(node.codes)), gathered(scales), m, n)


def _prepared(node: Frozen, implementation: str) -> Prepared:
    return Prepared(api.prepare(canonical(node), implementation), implementation)
