"""What a step minimises, as a function of parameters and a batch."""

from collections.abc import Callable
from functools import partial

from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from spectra_jax.model.parameters import apply
from spectra_jax.schema import Config
from spectra_jax.train.distillation import distillation_loss
from spectra_jax.train.loss import mean_loss

# (parameters, records (B, T + 1), whatever else the step was given, scale=loss scale or None) -> the loss
Objective = Callable[..., Float[Array, ""]]


def get_objective(config: Config, graphdef: nnx.GraphDef) -> Objective:
    """The loss of the next token, or what a teacher teaches; its step is then given a `distillation.Teacher`."""
    if config.distill.teacher:
        return partial(distillation_loss, config, graphdef)
    return partial(batch_loss, graphdef, chunks=config.train.loss_chunks)


def batch_loss(
    graphdef: nnx.GraphDef, parameters: PyTree, tokens: Int[Array, "B T1"], chunks: int,
    scale: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Mean loss in nats over a batch of records of T + 1 tokens; with a `scale` its gradient is that times as large."""
    model = apply(graphdef, parameters)
    return mean_loss(model.hidden(tokens[:, :-1]), model.head_matrix(), tokens[:, 1:], chunks, model.rules, scale)
