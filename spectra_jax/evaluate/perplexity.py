"""Loss, perplexity and bits per byte on prepared sets, with standard errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from spectra_jax.data.loader import Loader
from spectra_jax.data.manifest import Split
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply
from spectra_jax.sharding import gathered
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


def make_losses(graphdef: nnx.GraphDef, chunks: int) -> Callable[[PyTree, Array], Float[Array, "B"]]:
    """A function of (parameters, records (B, T+1)): the loss of every sequence, on all devices. Jit it.

    A sequence's loss is the mean over its T targets, in nats.
    """

    def losses(parameters: PyTree, records: Int[Array, "B T1"]) -> Float[Array, "B"]:
        model = apply(graphdef, parameters)
        found = token_losses(model.hidden(records[:, :-1]), model.head_matrix(), records[:, 1:], chunks, model.rules)
        return gathered(jnp.mean(found, axis=1))

    return losses


def sequence_losses(
    losses: Callable, parameters: PyTree, loader: Loader, sharding: jax.sharding.NamedSharding, limit: int | None = None
) -> Float[np.ndarray, "S"]:
    """Losses on the records of one prepared set in stored order, the first `limit` sequences or all.

    Two models of one tokenizer see the same sequences, so that their differences can be taken one by one.

    Args:
      losses: the jitted result of `make_losses`.

    Raises:
      UserError: `limit` leaves no sequence.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{limit} sequences to evaluate on; ask for at least 1, or leave the number out for all")
    found = []
    with loader.sequential(sharding=sharding, limit=limit) as batches:
        for records, mask in batches:
            found.append(np.asarray(losses(parameters, records), np.float64)[mask])
    return np.concatenate(found)


def quality(losses: Float[np.ndarray, "S"], split: Split, T: int) -> Quality:
    """The mean of sequence losses, with its error.

    Bits per byte count the text's own UTF-8 bytes (the manifest's tokens per byte), so that tokenizers compare.
    """
    loss, error = float(losses.mean()), standard_error(losses)
    per_byte = split.tokens / split.bytes / log(2)
    return Quality(loss, error, loss * per_byte, error * per_byte, losses.size * T, losses.size)


def combined(found: Sequence[Quality], weights: Sequence[float]) -> Quality:
    """Of a mixture: means by weight; the sets' errors are independent."""
    shares = [weight / sum(weights) for weight in weights]

    def mean(name: str) -> float:
        return sum(share * getattr(one, name) for share, one in zip(shares, found, strict=True))

    def error(name: str) -> float:
        return sqrt(sum((share * getattr(one, name)) ** 2 for share, one in zip(shares, found)))

    return Quality(
        mean("loss"), error("loss_error"), mean("bits_per_byte"), error("bits_per_byte_error"),
        sum(one.tokens for one in found), sum(one.sequences for one in found),
    )


def standard_error(values: Float[np.ndarray, "S"]) -> float:
    """Of the mean of independent values; 0 of a single one."""
    return float(values.std(ddof=1)) / sqrt(values.size) if values.size > 1 else 0.0


def evaluate(
    losses: Callable, parameters: PyTree, loader: Loader, sharding: jax.sharding.NamedSharding, limit: int | None = None
) -> Quality:
    """Quality on the records of one prepared set, by `sequence_losses`."""
    found = sequence_losses(losses, parameters, loader, sharding, limit)
    return quality(found, loader.manifests[0].splits[loader.split], loader.T)
