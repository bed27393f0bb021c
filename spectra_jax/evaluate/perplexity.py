"""Loss, perplexity and bits per byte on prepared sets, with standard errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply
from spectra_jax.train.loss import token_losses


@dataclass(frozen=True)
class Quality:
    """Quality on held-out text. `loss` is in nats per token; errors are standard errors over sequences."""

    loss: float
    loss_error: float
    bits_per_byte: float
    bits_per_byte_error: float
    tokens: int
    sequences: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return exp(self.loss)

    @property
    def perplexity_error(self) -> float:
        """First-order: perplexity times the error of the loss."""
        return self.perplexity * self.loss_error


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths; the whole paths where two end alike."""
    last = [Path(path).name for path in paths]
    return last if len(set(last)) == len(last) else list(paths)


def make_sums(graphdef: nnx.GraphDef, chunks: int) -> Callable[[PyTree, Array, Array], Float[Array, "2"]]:
    """A function of (parameters, records (B, T+1), mask (B)): the sum and the sum of squares of sequence losses.

    A sequence's loss is the mean over its T targets, in nats. Rows with a false mask do not count. Jit it.
    """

    def sums(parameters: PyTree, records: Int[Array, "B T1"], mask: Bool[Array, "B"]) -> Float[Array, "2"]:
        model = apply(graphdef, parameters)
        losses = token_losses(
            model.hidden(records[:, :-1]), model.head_matrix(), records[:, 1:], chunks, model.rules
        )
        per_sequence = jnp.where(mask, jnp.mean(losses, axis=1), 0.0)
        return jnp.stack([jnp.sum(per_sequence), jnp.sum(jnp.square(per_sequence))])

    return sums


def evaluate(
    sums: Callable, parameters: PyTree, loader: Loader, sharding: jax.sharding.NamedSharding, limit: int | None = None
) -> Quality:
    """Quality on the records of one prepared set in stored order, the first `limit` sequences or all.

    Bits per byte count the text's own UTF-8 bytes (the manifest's tokens per byte), so that tokenizers compare.

    Args:
      sums: the jitted result of `make_sums`.
      loader: over exactly one prepared set.

    Raises:
      UserError: `limit` leaves no sequence.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{limit} sequences to evaluate on; ask for at least 1, or leave the number out for all")
    total, squares, count = 0.0, 0.0, 0
    spread = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(sharding.spec[0]))
    with loader.sequential(sharding=sharding, limit=limit) as batches:
        for records, mask in batches:
            one, two = np.asarray(sums(parameters, records, jax.device_put(mask, spread)), np.float64)
            total, squares, count = total + one, squares + two, count + int(mask.sum())
    loss = total / count
    variance = max(squares / count - loss**2, 0.0) * count / max(count - 1, 1)
    error = sqrt(variance / count)
    split = loader.manifests[0].splits[loader.split]
    per_byte = split.tokens / split.bytes / log(2)
    return Quality(loss, error, loss * per_byte, error * per_byte, count * loader.T, count)
