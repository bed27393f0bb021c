"""Next-token cross-entropy that never holds the logits of a whole batch.

The vocabulary-sized logits exist for one chunk of the sequence at a time. Because the loss is a scalar, its
gradients can be formed in the same pass as the loss itself, so no chunk's logits are computed twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectra_jax.sharding import Rules


def _chunks(x: Array, count: int) -> list[Array]:
    """`x` cut along time (dim 1) into `count` nearly equal pieces."""
    T = x.shape[1]
    bounds = [T * i // count for i in range(count + 1)]
    return [x[:, a:b] for a, b in zip(bounds, bounds[1:])]


def _logits(hidden: Array, head: Array, rules: Rules) -> Float[Array, "B t V"]:
    return jnp.einsum(
        "btd,dv->btv", hidden, head.astype(hidden.dtype),
        preferred_element_type=jnp.float32, out_sharding=rules("batch", "time", "vocab"),
    )


def _is_target(logits: Array, targets: Array) -> Array:
    """One-hot of the targets as a comparison: it fuses away, and unlike a gather it works on a sharded vocabulary."""
    return jax.lax.broadcasted_iota(targets.dtype, (1, 1, logits.shape[2]), 2) == targets[..., None]


def _token_losses(logits: Array, targets: Array) -> Float[Array, "B t"]:
    picked = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def token_losses(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"],
    chunks: int, rules: Rules = Rules(),
) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target in nats, in float32."""
    pairs = zip(_chunks(hidden, chunks), _chunks(targets, chunks))
    return jnp.concatenate([_token_losses(_logits(x, head, rules), y) for x, y in pairs], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def mean_loss(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"],
    chunks: int, rules: Rules = Rules(),
) -> Float[Array, ""]:
    """Mean negative log-likelihood in nats over all B*T targets."""
    return jnp.mean(token_losses(hidden, head, targets, chunks, rules))


def _forward(hidden, head, targets, chunks, rules):
    total, d_head, d_hidden = jnp.zeros((), jnp.float32), None, []
    low, share = head.astype(hidden.dtype), 1.0 / targets.size
    for x, y in zip(_chunks(hidden, chunks), _chunks(targets, chunks)):
        if d_head is not None:
            # One chunk after the other: without this the compiler may hold the logits of all of them at once.
            x, d_head = jax.lax.optimization_barrier((x, d_head))
        logits = _logits(x, head, rules)
        norm = jax.nn.logsumexp(logits, axis=-1)
        hit = _is_target(logits, y)
        total = total + jnp.sum(norm - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))
        error = ((jnp.exp(logits - norm[..., None]) - hit) * share).astype(x.dtype)
        d_hidden.append(
            jnp.einsum("btv,dv->btd", error, low, out_sharding=rules("batch", "time", "act"))
        )
        part = jnp.einsum(
            "btd,btv->dv", x, error,
            preferred_element_type=jnp.float32, out_sharding=rules("embed", "vocab"),
        )
        d_head = part if d_head is None else d_head + part
    return total * share, (jnp.concatenate(d_hidden, axis=1), d_head)


def _backward(chunks, rules, gradients, g):
    d_hidden, d_head = gradients
    return d_hidden * g.astype(d_hidden.dtype), d_head * g, None


mean_loss.defvjp(_forward, _backward)
