"""Ternary and binary matrices as the packed product's kernels want them: made when a model is loaded to run."""

from functools import partial
from typing import no_type_check

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from pallas_kernels import api, parallel
from spectra_jax.errors import UserError
from spectra_jax.sharding import gathered, in_mesh
from spectra_jax.weights.form import Form, form, is_form, static
from spectra_jax.weights.frozen import Frozen


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Prepared(Form):
    """A matrix in the layout of one implementation. It is never stored.

    In a mesh it is in as many parts as the mesh's "model" axis has devices, cut along `cut` (0: in, 1: out).
    """

    matrix: api.Packed
    implementation: str = static()
    cut: int = static()

    def product(self, x: Float[Array, "r m"], spec: P | None = None) -> Float[Array, "r n"]:
        """By the implementation, on every device its part, of its rows."""
        if not in_mesh():
            return api.ternary_matmul(x, self.matrix, implementation=self.implementation)
        rows = jax.typeof(x).sharding.spec[0]
        return gathered(parallel.sharded_matmul(x, self.matrix, self.cut, "model", self.implementation, rows), spec)


def prepare(parameters: PyTree, weights: str) -> tuple[PyTree, str]:
    """The parameters with every `Frozen` matrix prepared for the mesh that is set, and the implementation.

    Args:
      weights: an implementation of `pallas_kernels.api`; "packed" is the first that serves here, "dense" changes
        nothing.

    Raises:
      UserError: there is no such matrix, or the implementation cannot serve one; the message says why.
    """
    if weights == "dense":
        return parameters, weights
    forms = [node.core for node in jax.tree.leaves(parameters, is_leaf=is_form) if is_form(node)]
    matrices = [core for core in forms if isinstance(core, Frozen)]
    if not matrices:
        raise UserError("packed products are of ternary and binary models; this one has no such matrix")
    try:
        one_layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), matrices[0])
        of_one_layer = jax.eval_shape(canonical, one_layer)
        x = jax.ShapeDtypeStruct((1, of_one_layer.m), "float32")
        implementation = api.choose(x, of_one_layer)[0] if weights == "packed" else weights
        api.check(x, of_one_layer, implementation)
        convert = jax.jit(partial(_prepared, implementation=implementation))

        def of(node: PyTree) -> PyTree:
            packed = is_form(node) and isinstance(node.core, Frozen)
            return node.with_core(convert(node.core)) if packed else node

        ready = jax.tree.map(of, parameters, is_leaf=is_form)
    except ValueError as error:
        raise UserError(f"{error}; use another implementation, or the unpacked weights") from error
    return ready, implementation


def canonical(node: Frozen) -> api.Packed:
    """The matrix in the canonical storage of the kernels, outside a mesh."""
    return api.Packed(api.pack(node.codes), _scales(node), *node.codes.shape[-2:])


def _prepared(node: Frozen, implementation: str) -> Prepared:
    if in_mesh():
        matrix = parallel.shard(node.codes, _scales(node), node.axis, "model", implementation)
    else:
        matrix = api.prepare(canonical(node), implementation)
    return Prepared(matrix, implementation, node.axis)


def _scales(node: Frozen) -> Float[Array, "*L g s"]:
    return node.scales[..., :, None] if node.axis == 0 else node.scales[..., None, :]
