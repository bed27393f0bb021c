"""Next-token cross-entropy that never holds the logits of a whole batch.

The vocabulary-sized logits exist for one chunk of the sequence at a time. Because the loss is a scalar, its
gradients can be formed in the same pass as the loss itself, so no chunk's logits are computed twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectra_jax.sharding import Rules


def _chunks(x: Array, count: int) -> Array:
    """`x` cut along time (dim 1) into equal pieces: (count, B, T/count, ...)."""
    B, T = x.shape[:2]
    return jnp.moveaxis(x.reshape(B, count, T // count, *x.shape[2:]), 1, 0)


def _logits(x: Array, head: Array, rules: Rules) -> Float[Array, "R V"]:
    return jnp.einsum(
        "rd,dv->rv", x, head, preferred_element_type=jnp.float32, out_sharding=rules("batch", "vocab")
    )


def _picked(logits: Float[Array, "R V"], targets: Int[Array, "R"]) -> tuple[Array, Array]:
    """One-hot targets, and their logits: by comparison, not gather, for that works on a sharded vocabulary."""
    hit = jax.lax.broadcasted_iota(targets.dtype, (1, logits.shape[1]), 1) == targets[:, None]
    return hit, jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def token_losses(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"],
    chunks: int, rules: Rules = Rules(),
) -> Float[Array, "B T"]:
    """Negative log-likelihood of every target in nats, in float32. `chunks` divides T."""
    low = head.astype(hidden.dtype)

    def one(_: None, piece: tuple[Array, Array]) -> tuple[None, Array]:
        x, y = piece
        logits = _logits(x.reshape(-1, x.shape[-1]), low, rules)
        _, picked = _picked(logits, y.reshape(-1))
        return None, (jax.nn.logsumexp(logits, axis=-1) - picked).reshape(y.shape)

    _, losses = jax.lax.scan(one, None, (_chunks(hidden, chunks), _chunks(targets, chunks)))
    return jnp.moveaxis(losses, 0, 1).reshape(targets.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def mean_loss(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"],
    chunks: int, rules: Rules = Rules(),
) -> Float[Array, ""]:
    """Mean negative log-likelihood in nats over all B*T targets."""
    return jnp.mean(token_losses(hidden, head, targets, chunks, rules))


def _forward(hidden, head, targets, chunks, rules):
    low, share, D = head.astype(hidden.dtype), 1.0 / targets.size, hidden.shape[-1]

    def one(sums: tuple[Array, Array], piece: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, d_head = sums
        x, y = piece[0].reshape(-1, D), piece[1].reshape(-1)
        logits = _logits(x, low, rules)
        hit, picked = _picked(logits, y)
        top = jnp.max(logits, axis=-1, keepdims=True)
        powers = jnp.exp(logits - top)  # taken once, for the loss and for its gradient
        norm = jnp.sum(powers, axis=-1, keepdims=True)
        total = total + jnp.sum(jnp.log(norm) + top) - jnp.sum(picked)
        error = ((powers / norm - hit) * share).astype(x.dtype)
        d_x = jnp.einsum("rv,dv->rd", error, low, out_sharding=rules("batch", "act"))
        part = jnp.einsum(
            "rd,rv->dv", x, error, preferred_element_type=jnp.float32, out_sharding=rules("embed", "vocab")
        )
        return (total, d_head + part), d_x.reshape(piece[0].shape)

    start = (jnp.zeros((), jnp.float32), jnp.zeros_like(head, jnp.float32))
    (total, d_head), d_hidden = jax.lax.scan(one, start, (_chunks(hidden, chunks), _chunks(targets, chunks)))
    return total * share, (jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape), d_head)


def _backward(chunks, rules, gradients, g):
    d_hidden, d_head = gradients
    return d_hidden * g.astype(d_hidden.dtype), d_head * g, None


mean_loss.defvjp(_forward, _backward)
