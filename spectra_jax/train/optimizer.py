"""The direction of an update (an optax transformation) and how it is applied.

Learning rate and weight decay are functions of the step, not of the optimizer's own count: a skipped step leaves the
optimizer untouched and the schedule on time.
"""

import jax
import optax
from jaxtyping import Array, Float, PyTree

from spectra_jax.schema import Optimizer


def make_optimizer(o: Optimizer) -> optax.GradientTransformation:
    """Clipping by global norm, then Adam's direction; states in float32."""
    return optax.chain(
        optax.clip_by_global_norm(o.clip),
        optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
    )


def decay_mask(o: Optimizer, parameters: PyTree) -> PyTree:
    """Which parameters are decayed: those whose path holds none of `no_decay`."""

    def decayed(path: tuple, _: Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return not any(part in name for part in o.no_decay)

    return jax.tree_util.tree_map_with_path(decayed, parameters)


def apply_updates(
    parameters: PyTree, direction: PyTree, mask: PyTree, rate: Float[Array, ""], decay: Float[Array, ""]
) -> PyTree:
    """p - rate * (direction + decay * p), decoupled weight decay (AdamW, arXiv 1711.05101, algorithm 2)."""
    return jax.tree.map(
        lambda p, d, decayed: p - rate * (d + decay * p if decayed else d), parameters, direction, mask
    )
