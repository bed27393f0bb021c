"""Which steps are not taken: those that are not finite and, if asked, those far above the ones before them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from spectra_jax.schema import Train


def init_window(train: Train) -> PyTree:
    """The last `train.skip_window` losses and gradient norms, of which there are none yet."""
    return {"values": jnp.zeros((train.skip_window, 2), jnp.float32), "count": jnp.zeros((), jnp.int32)}


def judge(
    train: Train, window: PyTree, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], PyTree]:
    """Whether a step with this loss and gradient norm is taken, and the window after it.

    With train.skip_sigma = k > 0 and a full window, a value beyond mean + k standard deviations of the window is a
    spike. A spike enters the window as that limit, so that one cannot hide the next and a lasting change of level is
    still followed in time; what is not finite does not enter at all. (OLMo-core and Levanter skip likewise, by
    default beyond 6 deviations of the last 128 steps.)
    """
    values, count, size = window["values"], window["count"], train.skip_window
    new = jnp.stack([loss, norm]).astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(new))
    limit = jnp.full_like(new, jnp.inf)
    if train.skip_sigma > 0:
        above = jnp.mean(values, axis=0) + train.skip_sigma * jnp.std(values, axis=0)
        limit = jnp.where(count < size, limit, above)
    entered = values.at[count % size].set(jnp.minimum(new, limit))
    after = {"values": jnp.where(finite, entered, values), "count": count + finite}
    return finite & jnp.all(new <= limit), after
