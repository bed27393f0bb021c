"""Next-token cross-entropy that never holds the logits of a whole batch.

The vocabulary-sized logits exist for one chunk of the sequence at a time. Because the loss is a scalar, its
gradients can be formed in the same pass as the loss itself, so no chunk's logits are computed twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from spectra_jax.sharding import Rules, gathered, in_mesh

# Where a reshape leaves the batch is said every time: with one sequence (B = 1) it cannot be inferred.


def cut(x: Array, count: int, rules: Rules) -> Array:
    """`x` (B, T, ...) cut along time into equal chunks of rows: (count, B*T/count, ...)."""
    B, T, *rest = x.shape
    kept = ("act",) * len(rest)
    pieces = jnp.reshape(x, (B, count, T // count, *rest), out_sharding=rules("batch", None, "time", *kept))
    rows = (count, B * T // count, *rest)
    return jnp.reshape(jnp.moveaxis(pieces, 1, 0), rows, out_sharding=rules(None, "batch", *kept))


def _joined(chunks: Array, shape: tuple[int, ...], rules: Rules) -> Array:
    """The inverse of `cut`."""
    B, T, *rest = shape
    kept, count = ("act",) * len(rest), chunks.shape[0]
    pieces = jnp.reshape(chunks, (count, B, T // count, *rest), out_sharding=rules(None, "batch", "time", *kept))
    return jnp.reshape(jnp.moveaxis(pieces, 0, 1), shape, out_sharding=rules("batch", "time", *kept))


def logits_of_rows(x: Float[Array, "R D"], head: Float[Array, "D V"], rules: Rules) -> Float[Array, "R V"]:
    """x @ head in float32; the vocabulary stays spread as the head is."""
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
    low = gathered(head.astype(hidden.dtype), rules(None, "vocab"))

    def one(_: None, piece: tuple[Array, Array]) -> tuple[None, Array]:
        x, y = piece
        logits = logits_of_rows(x, low, rules)
        _, picked = _picked(logits, y)
        return None, jax.nn.logsumexp(logits, axis=-1) - picked

    _, losses = jax.lax.scan(one, None, (cut(hidden, chunks, rules), cut(targets, chunks, rules)))
    return _joined(losses, targets.shape, rules)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def mean_loss(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"],
    chunks: int, rules: Rules = Rules(), scale: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean negative log-likelihood in nats over all B*T targets.

    Its gradients are multiplied by `scale`, the loss is not: they are rounded to the dtype of `hidden` in here, and
    in float16 a small probability over B*T would be 0 before any multiplication outside.
    """
    return jnp.mean(token_losses(hidden, head, targets, chunks, rules))


def _forward(hidden, head, targets, chunks, rules, scale):
    low, share = gathered(head.astype(hidden.dtype), rules(None, "vocab")), 1.0 / targets.size
    weight = share if scale is None else share * scale  # of a target in the gradients
    # Every device sums its own rows, over all chunks; the devices' sums are added once, at the end.
    own = _unreduced(rules)

    def one(sums: tuple[Array, Array], piece: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, d_head = sums
        x, y = piece
        logits = logits_of_rows(x, low, rules)
        hit, picked = _picked(logits, y)
        top = jnp.max(logits, axis=-1, keepdims=True)
        powers = jnp.exp(logits - top)  # taken once, for the loss and for its gradient
        norm = jnp.sum(powers, axis=-1, keepdims=True)
        total = total + jnp.sum(jnp.log(norm) + top) - jnp.sum(picked)
        error = ((powers / norm - hit) * weight).astype(x.dtype)
        d_x = jnp.einsum("rv,dv->rd", error, low, out_sharding=rules("batch", "act"))
        part = jnp.einsum(
            "rd,rv->dv", x, error, preferred_element_type=jnp.float32, out_sharding=own
        )
        return (total, d_head + part), d_x

    zero = gathered(jnp.zeros(head.shape, jnp.float32), rules(None, "vocab"))
    start = (jnp.zeros((), jnp.float32), zero if own is None else gathered(zero, own))
    pieces = cut(hidden, chunks, rules), cut(targets, chunks, rules)
    (total, d_head), d_hidden = jax.lax.scan(one, start, pieces)
    # Added up before the backward pass of the blocks, beside which every device would keep the whole of its sum.
    d_hidden, d_head = jax.lax.optimization_barrier((d_hidden, gathered(d_head, rules("embed", "vocab"))))
    return total * share, (_joined(d_hidden, hidden.shape, rules), d_head)


def _unreduced(rules: Rules) -> PartitionSpec | None:
    """Of a (D, V) array whose value is the sum of those that the devices of the batch have."""
    if not in_mesh():
        return None
    axes = (rules.batch,) if isinstance(rules.batch, str) else rules.batch or ()
    return PartitionSpec(None, rules.vocab, unreduced=frozenset(axes))


def _backward(chunks, rules, gradients, g):
    d_hidden, d_head = gradients
    return d_hidden * g.astype(d_hidden.dtype), d_head * g, None, None


mean_loss.defvjp(_forward, _backward)
