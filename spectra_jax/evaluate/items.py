"""What a question is, what is measured of it, and a kind of questions as one object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

import numpy as np
from jaxtyping import Float

from spectra_jax.evaluate.scoring import Score


@dataclass(frozen=True)
class Item:
    """One question: (context, continuation) of every answer, and which is right; a `target` has only the right one."""

    task: str
    kind: str
    pairs: tuple[tuple[str, str], ...]
    gold: int = 0


@dataclass(frozen=True)
class Metric:
    """A mean over items, or the exponential of one, with its standard error."""

    name: str
    value: float
    error: float


Answers = Sequence[tuple[Item, Sequence[Score]]]


@dataclass(frozen=True)
class Kind:
    """Questions of one form, whose lines have all of `keys`.

    `read` makes an item of (task, line, where it stands); `measure` makes metrics of items with the scores of their
    pairs.
    """

    keys: tuple[str, ...]
    read: Callable[[str, Mapping[str, Any], str], Item]
    measure: Callable[[Answers], tuple[Metric, ...]]


def mean_and_error(values: Sequence[float] | Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Mean and its standard error; NaN for the error of one value."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1)) / sqrt(n) if n > 1 else nan


def sums(scores: Sequence[Score]) -> Float[np.ndarray, "n"]:
    """Log-likelihoods in nats of the answers to one question."""
    return np.array([one.loglikelihood for one in scores])
