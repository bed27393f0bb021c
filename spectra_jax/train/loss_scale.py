"""Dynamic loss scaling: float16 ends at 6e-8 below and 65504 above, and gradients are kept between by a scale.

They are computed times the scale (Mixed Precision Training, arXiv 1710.03740, section 3.2), divided by it in float32,
and the scale follows what fits: it is halved where a gradient is not finite, and doubled after a number of steps
without that. The Spectra paper trained so (A.2), and prints the lowest scale and the skipped steps of every run
(Table 5): about one for every thousand steps, so that an overflow seems to have halved the scale at once, without
the hysteresis of its code base.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from spectra_jax.schema import Train

Scaling = dict[str, Array]


def init_scaling(train: Train) -> Scaling:
    """The scale of the first step, and how many steps in a row have fitted under the present one."""
    return {"scale": jnp.asarray(train.loss_scale, jnp.float32), "good_steps": jnp.zeros((), jnp.int32)}


def unscaled(gradient: PyTree, scale: Float[Array, ""]) -> PyTree:
    """A gradient in float32 that was computed times `scale`."""
    return jax.tree.map(lambda g: g / scale, gradient)


def adapt(
    train: Train, scaling: Scaling, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Scaling, Bool[Array, ""]]:
    """The scaling of the next step, and whether this one is skipped by no fault but the scale's.

    `loss` is not scaled: where it is not finite the forward pass failed, which no scale mends, and the scale stays.
    Where only the gradient's `norm` is not finite the scale was too high. At its lowest, `train.loss_scale_min`, it
    stays there and takes no blame any more.
    """
    scale, fits = scaling["scale"], jnp.isfinite(norm)
    overflow = jnp.isfinite(loss) & ~fits
    good = jnp.where(overflow, 0, scaling["good_steps"] + fits)
    grows = good >= train.loss_scale_window
    lower = jnp.maximum(scale / 2, train.loss_scale_min)
    after = {
        "scale": jnp.where(overflow, lower, jnp.where(grows, scale * 2, scale)),
        "good_steps": jnp.where(grows, 0, good),
    }
    return after, overflow & (scale > train.loss_scale_min)
