"""Small models with weights large enough to matter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.model import parameters as trees
from spectra_jax.schema import Model


@pytest.fixture(scope="session")
def build() -> Callable:
    """A function from the shape of a model to (graphdef, parameters).

    Weights are uniform with deviation `std`, gains differ from 1. Drawn by numpy: compiling JAX's
    own initialisation would take longer than most tests.
    """

    def make(m: Model, seed: int = 0, std: float = 0.2):
        rng = np.random.default_rng(seed)

        def draw(path, shape):
            low, high = (
                (0.5, 1.5)
                if "gain" in jax.tree_util.keystr(path)
                else (-std * 3**0.5, std * 3**0.5)
            )
            return jnp.asarray(rng.uniform(low, high, shape.shape), jnp.float32)

        shapes = jax.eval_shape(lambda key: trees.init_parameters(m, key), jax.random.key(0))
        return trees.graphdef_of(m), jax.tree_util.tree_map_with_path(draw, shapes)

    return make
