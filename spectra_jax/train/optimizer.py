"""The direction of an update (an optax transformation) and how it is applied.

Learning rate and weight decay are functions of the step, not of the optimizer's own count: a skipped step leaves the
optimizer untouched and the schedule on time.
"""

from collections.abc import Callable
from functools import cache
from math import prod

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from spectra_jax.checksum import dotted
from spectra_jax.errors import UserError, one_of
from spectra_jax.model.parameters import init_parameters
from spectra_jax.schema import Model, Optimizer
from spectra_jax.train.blockwise_state import blockwise
from spectra_jax.train.dynamic_map import SIGNED, UNSIGNED, DynamicMap
from spectra_jax.train.final import Final
from spectra_jax.train.sparsity import keep_zeros
from spectra_jax.train.spiel import spiel
from spectra_jax.values import parse_rate


def adam(o: Optimizer) -> optax.GradientTransformation:
    """Adam's direction (arXiv 1412.6980); states in float32."""
    return optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)


def lion(o: Optimizer) -> optax.GradientTransformation:
    """The sign of a mean of gradients (arXiv 2302.06675, algorithm 2); its state in float32."""
    return optax.scale_by_lion(b1=o.b1, b2=o.b2)


def momentum(o: Optimizer) -> optax.GradientTransformation:
    """g + b1 * (what it was), as PyTorch's SGD without dampening; its state in float32."""
    return optax.trace(decay=o.b1)


def in_8_bits(o: Optimizer, inner: optax.GradientTransformation, **maps: DynamicMap) -> optax.GradientTransformation:
    """`inner` with states in 8 bits (arXiv 2110.02861), but for those of parameters that are small or named.

    Raises:
      UserError: from its `init`, if that is all of them.
    """

    def elements(path: tuple, x: Array) -> int:
        # Layers are stacked, and it is the matrix of one that counts, as where each has an array of its own.
        return prod(x.shape[1:] if _named(path, ("blocks",)) else x.shape)

    def chosen(path: tuple, x: Array) -> bool:
        return elements(path, x) >= o.float_below and not _named(path, o.float_states)

    def init(parameters: PyTree) -> optax.OptState:
        leaves = jax.tree_util.tree_leaves_with_path(parameters)
        if not any(chosen(*leaf) for leaf in leaves):
            free = [elements(*leaf) for leaf in leaves if not _named(leaf[0], o.float_states)]
            raise UserError(
                f"config.optimizer.name={o.name} would have no state in 8 bits: the largest array that "
                f"float_states={','.join(o.float_states)} does not name has {max(free, default=0):,} elements, and "
                f"those below config.optimizer.float_below={o.float_below} stay in float32; lower it, or use "
                f"{o.name.removesuffix('8bit')}"
            )
        return small.init(parameters)

    small = blockwise(inner, chosen, **maps)
    return small._replace(init=init)


# A new optimizer is a function of the settings and a line here. Its `update` may take `rate`, the learning rate of
# the step, by which the direction that it returns will be multiplied; `decay`, the weight decay of the step; and
# `steps`, how many there are in all. Instead of a direction it may return a parameter's new values (final.py).
DIRECTIONS: dict[str, Callable[[Optimizer], optax.GradientTransformation]] = {
    "adamw": adam,
    "adamw8bit": lambda o: in_8_bits(o, adam(o), mu=SIGNED, nu=UNSIGNED),
    "lion": lion,
    "lion8bit": lambda o: in_8_bits(o, lion(o), mu=SIGNED),
    "momentum": momentum,
    "momentum8bit": lambda o: in_8_bits(o, momentum(o), trace=SIGNED),
    "spiel": spiel,
}


def make_optimizer(o: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then the direction of the optimizer of this name.

    Raises:
      UserError: there is none; the message names the nearest.
    """
    direction = DIRECTIONS[one_of(o.name, DIRECTIONS, "config.optimizer.name")](o)
    whole = optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(o.clip), direction))
    return keep_zeros(whole) if o.keep_zeros else whole


@cache
def state_bytes(m: Model, o: Optimizer) -> int:
    """What the optimizer's state of a model takes, over all devices; AdamW's in float32 is 8 bytes a parameter."""

    def state() -> PyTree:
        return make_optimizer(o).init(split(o, init_parameters(m, jax.random.key(0)))[0])

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(state)))


def split(o: Optimizer, parameters: PyTree) -> tuple[PyTree, PyTree]:
    """What is trained and what is not, each with None in the places of the other.

    Whole numbers never are trained; of the rest everything is, or what `only` names.

    Raises:
      UserError: nothing is left to train.
    """

    def trained(path: tuple, leaf: Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and (not o.only or _named(path, o.only))

    kept = jax.tree_util.tree_map_with_path(trained, parameters)
    if not any(jax.tree.leaves(kept)):
        names = sorted({dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)})
        raise UserError(f"config.optimizer.only={','.join(o.only)} names no parameter; they are {', '.join(names)}")
    return (
        jax.tree.map(lambda leaf, keep: leaf if keep else None, parameters, kept),
        jax.tree.map(lambda leaf, keep: None if keep else leaf, parameters, kept),
    )


def joined(trained: PyTree, fixed: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda leaf: leaf is None)


def decay_mask(o: Optimizer, parameters: PyTree) -> PyTree:
    """Which parameters are decayed: those whose path holds none of `no_decay`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _named(path, o.no_decay), parameters)


def rate_factors(o: Optimizer, parameters: PyTree) -> PyTree:
    """By what the learning rate of each parameter is multiplied; the last of `rates` that names it decides."""
    factors = dict(parse_rate(text) for text in o.rates)

    def factor(path: tuple, _: Array) -> float:
        return next((factors[part] for part in reversed(factors) if _named(path, (part,))), 1.0)

    return jax.tree_util.tree_map_with_path(factor, parameters)


def apply_updates(
    parameters: PyTree, direction: PyTree, mask: PyTree, rate: Float[Array, ""], decay: Float[Array, ""],
    factors: PyTree | None = None,
) -> PyTree:
    """p - rate * (direction + decay * p), decoupled weight decay (AdamW, arXiv 1711.05101, algorithm 2).

    A `Final` in the place of a direction is the new parameter.
    """
    factors = jax.tree.map(lambda _: 1.0, parameters) if factors is None else factors

    def updated(p: Array, d: Array | Final, decayed: bool, factor: float) -> Array:
        if isinstance(d, Final):
            return d.value
        return p - (rate if factor == 1 else rate * factor) * (d + decay * p if decayed else d)

    return jax.tree.map(updated, parameters, direction, mask, factors)


def _named(path: tuple, parts: tuple[str, ...]) -> bool:
    return any(part in dotted(path) for part in parts)
