"""How much of the loss each channel of each matrix stands for.

LLM-Pruner (arXiv 2305.11627), section 3.2: the loss without a weight w, by Taylor's series about it, differs by
w g - w^2 F / 2, where g is the gradient of the mean loss and F the diagonal of the empirical Fisher matrix,
the mean of squared gradients of single examples, in place of the Hessian's.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from spectra_jax.model.matrices import MATRICES, Key
from spectra_jax.model.parameters import block_matrices, graphdef_of, with_matrices
from spectra_jax.serve.load import Loaded
from spectra_jax.sharding import Rules
from spectra_jax.train.objective import batch_loss

Gradients = dict[Key, Array]


class Criterion(NamedTuple):
    """One way to tell what matters.

    salience: (w, g, F) -> that of each weight; those of a channel are added up, and the magnitude of that is taken.
    gradient, fisher: whether it looks at g, at F.
    """

    salience: Callable[[Array, Array | None, Array | None], Array]
    gradient: bool = True
    fisher: bool = False


# The names are the reference's.
CRITERIA: dict[str, Criterion] = {
    "param_first": Criterion(lambda w, g, f: jnp.abs(w * g)),
    "vectorize": Criterion(lambda w, g, f: w * g),
    "param_second": Criterion(lambda w, g, f: w * w * f, fisher=True),
    "param_mix": Criterion(lambda w, g, f: jnp.abs(w * g - w * w * f / 2), fisher=True),
    "l1": Criterion(lambda w, g, f: jnp.abs(w), gradient=False),
    "l2": Criterion(lambda w, g, f: w * w, gradient=False),
}


def channels(
    matrices: Gradients, gradients: Gradients | None, fisher: Gradients | None, criterion: str
) -> dict[Key, Float[np.ndarray, "L C"]]:
    """Importance of each channel of every stacked matrix (L, in, out), along the dim that is cut."""
    salience = CRITERIA[criterion].salience

    @partial(jax.jit, static_argnums=3)
    def one(w: Array, g: Array | None, f: Array | None, axis: int) -> Array:
        return jnp.abs(jnp.sum(salience(w, g, f), axis=axis))

    return {
        key: np.asarray(one(w, gradients and gradients[key], fisher and fisher[key], 2 - MATRICES[key]))
        for key, w in matrices.items()
    }


def mean_gradients(
    source: Loaded, records: Iterable[Int[np.ndarray, "1 T1"]], *, fisher: bool
) -> tuple[Gradients, Gradients | None]:
    """Gradient of the mean loss over the records for every block matrix, and with `fisher` the mean of its squares.

    Records are equally long, so one after the other gives both: the gradient of their mean is the mean of gradients.
    All in float32. No device takes a record of its own: on any mesh they may be as few as one likes.
    """
    m, rules = replace(source.config.model, compute_dtype="float32", remat="full"), Rules(batch=None)
    graphdef, everywhere = graphdef_of(m, rules), NamedSharding(source.mesh, jax.P())

    def loss(matrices: Gradients, parameters: dict, tokens: Array) -> Array:
        parameters = {**parameters, "blocks": with_matrices(parameters["blocks"], matrices)}
        chunks = gcd(source.config.train.loss_chunks, tokens.shape[1] - 1)
        return batch_loss(graphdef, parameters, tokens, chunks)

    @partial(jax.jit, donate_argnums=0)
    def add(sums: tuple[Gradients, Gradients | None], parameters: dict, tokens: Array):
        new = jax.grad(loss)(block_matrices(parameters), parameters, tokens)
        total, squares = sums
        squares = squares and jax.tree.map(lambda s, g: s + g * g, squares, new)
        return jax.tree.map(jnp.add, total, new), squares

    def zeros() -> Gradients:
        return jax.tree.map(jnp.zeros_like, block_matrices(source.parameters))

    sums, count = (zeros(), zeros() if fisher else None), 0
    for record in records:
        sums = jax.block_until_ready(add(sums, source.parameters, jax.device_put(record, everywhere)))
        count += 1
    return jax.tree.map(lambda x: x / count, sums)
