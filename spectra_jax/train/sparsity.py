"""Training with a constant mask: weights of block matrices that are zero at the start stay zero.

For models pruned by SparseGPT or by magnitude, which then go on training (Sparse Llama, arXiv 2405.03594). The mask is
taken from the first parameters and kept with the optimizer's state, so that it outlives checkpoints, and a weight that
passes through zero later is still trained. Gradients are masked before their norm is taken, hence no moment of a zero
ever grows; decay leaves zeros alone; and the direction is masked once more, for optimizers that would move a weight
whose gradient is zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from spectra_jax.errors import UserError
from spectra_jax.model.parameters import is_block_matrix


class MaskedState(NamedTuple):
    """`mask` has None where a parameter is no block matrix."""

    mask: PyTree
    inner: optax.OptState


def keep_zeros(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` for the weights that are not zero when it is initialised."""
    inner = optax.with_extra_args_support(inner)

    def init(parameters: PyTree) -> MaskedState:
        mask = jax.tree_util.tree_map_with_path(lambda path, w: w != 0 if is_block_matrix(path) else None, parameters)
        return MaskedState(mask, inner.init(parameters))

    def update(gradient: PyTree, state: MaskedState, parameters: PyTree, **extra: Any) -> tuple[PyTree, MaskedState]:
        direction, after = inner.update(_masked(gradient, state.mask), state.inner, parameters, **extra)
        return _masked(direction, state.mask), MaskedState(state.mask, after)

    return optax.GradientTransformationExtraArgs(init, update)


def check_zeros(mask: PyTree) -> None:
    """Raises UserError if there is no zero to keep."""
    if all(bool(jnp.all(one)) for one in jax.tree.leaves(mask)):
        raise UserError(
            "config.optimizer.keep_zeros=True, and no weight of the first model is zero: begin with a pruned one, by "
            "--config.train.start=RUN, made by spectra quantize --config.quantize.method=sparsegpt or magnitude"
        )


def _masked(tree: PyTree, mask: PyTree) -> PyTree:
    def one(x: Array, keep: Array | None) -> Array:
        return x if keep is None else jnp.where(keep, x, 0)

    return jax.tree.map(one, tree, mask)
