"""Learning from a frozen teacher: its next-token distribution, and the directions of its features (TernaryLLM).

"Outlier-Friendly Feature" distillation (arXiv 2406.07177) compares features by the cosine of each token's two vectors,
which no scale of either changes, so that a few large channels or tokens do not outweigh the rest. No code of the paper
is public; which layers it compares and how it weighs the terms are fields of `config.distill`.
"""

from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from spectra_jax.model.parameters import apply
from spectra_jax.schema import Config
from spectra_jax.sharding import Rules, gathered
from spectra_jax.train.loss import cut, logits_of_rows, mean_loss


@no_type_check  # as a pytree it also carries shapes and shardings
@partial(jax.tree_util.register_dataclass, data_fields=["parameters"], meta_fields=["graphdef"])
@dataclass(frozen=True)
class Teacher:
    """A model that is not trained; its parameters are an argument of the step and no part of its state."""

    graphdef: nnx.GraphDef
    parameters: PyTree


def distillation_loss(
    config: Config, graphdef: nnx.GraphDef, parameters: PyTree, tokens: Int[Array, "B T1"], teacher: Teacher,
    scale: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The weighted sum of the terms of `config.distill`; with a `scale` its gradient is that times as large."""
    d, chunks = config.distill, config.train.loss_chunks
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    master = apply(teacher.graphdef, jax.lax.stop_gradient(teacher.parameters))
    model = apply(graphdef, parameters)
    theirs, their_features = master.features(inputs)
    ours, our_features = model.features(inputs)
    total = jnp.zeros((), jnp.float32)
    if d.logits:
        pair = (ours, model.head_matrix()), (theirs, master.head_matrix())
        total += d.logits * divergence(*pair, chunks, d.temperature, model.rules)
    if d.features:
        total += d.features * jnp.sum(feature_distance(our_features, their_features))
    if scale is not None:
        total = jax.lax.stop_gradient(total - total * scale) + total * scale
    if d.next_token:
        total += d.next_token * mean_loss(ours, model.head_matrix(), targets, chunks, model.rules, scale)
    return total


def divergence(
    student: tuple[Float[Array, "B T D"], Float[Array, "D V"]],
    teacher: tuple[Float[Array, "B T E"], Float[Array, "E V"]],
    chunks: int, temperature: float = 1.0, rules: Rules = Rules(),
) -> Float[Array, ""]:
    """Mean over tokens of KL(teacher || student) in nats, both softened by the temperature, times its square.

    The square keeps gradients at the size that they have without softening (arXiv 1503.02531).

    Args:
      student: last hidden states and head. teacher: the same; its width may be another.
      chunks: of the sequence, one at a time; the logits of each are computed again in the backward pass.
    """
    heads = [gathered(head.astype(h.dtype), rules(None, "vocab")) for h, head in (student, teacher)]

    @jax.checkpoint
    def one(total: Array, pieces: tuple[Array, Array]) -> tuple[Array, None]:
        mine, theirs = (
            jax.nn.log_softmax(logits_of_rows(x, head, rules) / temperature) for x, head in zip(pieces, heads)
        )
        return total + jnp.sum(jnp.exp(theirs) * (theirs - mine)), None

    pieces = tuple(cut(h, chunks, rules) for h, _ in (student, teacher))
    total, _ = jax.lax.scan(one, jnp.zeros((), jnp.float32), pieces)
    B, T, _ = student[0].shape
    return total * (temperature**2 / (B * T))


def feature_distance(
    ours: Float[Array, "L B T D"], theirs: Float[Array, "L B T D"], eps: float = 1e-6
) -> Float[Array, "L"]:
    """1 - cosine of each token's two vectors, averaged over tokens: 0 for equal directions, whatever their lengths."""
    a, b = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    lengths = jnp.sqrt(jnp.sum(a * a, -1) * jnp.sum(b * b, -1))
    return jnp.mean(1.0 - jnp.sum(a * b, -1) / jnp.maximum(lengths, eps), axis=(1, 2))
