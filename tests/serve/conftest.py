"""Small models with weights large enough to matter, as `load` gives them, made without training."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from helpers import drawn, texts
from jax.sharding import NamedSharding

from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.model import parameters as trees
from spectra_jax.schema import Config, Data, Mesh, Model
from spectra_jax.serve.load import Loaded
from spectra_jax.sharding import make_mesh
from spectra_jax.weights.grid import Grid

SHAPE = dict(V=304, D=32, F=48, L=2, N=4, K=2, H=8, attention_blocks=2, compute_dtype="float32")


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    """Of 295 ids: the bytes, the end of a document and all pairs that its texts have twice."""
    return tokenizers.train(texts(20), 300)


@pytest.fixture(scope="session")
def make() -> Callable[..., Loaded]:
    """A function from the kind of weights and changes of the shape to a model on one device or on a mesh.

    "grid" and "grid8" are float models whose matrices are 4-bit grids; the second rounds activations to 8 bits too.
    """

    def one(weight: str = "float", *, T: int = 64, mesh: Mesh = Mesh(1, 1, 1), std: float = 0.2, **changes) -> Loaded:
        m = Model(**SHAPE | {"weight": weight.replace("grid8", "float").replace("grid", "float")} | changes)
        devices = jax.devices()[: mesh.slice * mesh.data * mesh.model]
        config = Config(model=m, data=Data(T=T, batch=8), mesh=mesh)
        spread = make_mesh(config, devices)
        with jax.set_mesh(spread):
            like = jax.eval_shape(lambda key: trees.init_parameters(m, key), jax.random.key(0))
            parameters = jax.tree.map(
                lambda w, x: jax.device_put(w, NamedSharding(spread, x.sharding.spec)), drawn(like, 0, std), like
            )
            if weight.startswith("grid"):
                ws = trees.block_matrices(parameters)
                grids = {key: on_grid(w, weight == "grid8") for key, w in ws.items()}
                parameters = {**parameters, "blocks": trees.with_matrices(parameters["blocks"], grids)}
            parameters = trees.freeze(m, parameters)
            return Loaded(config, spread, trees.graphdef_of(m), parameters, tokenizer(), 0, {})

    return one


def on_grid(w: jax.Array, tokens8: bool) -> Grid:
    """Stacked matrices (L, m, n) in codes from -7 to 7, two groups of inputs with a scale each."""
    L, m, n = w.shape
    scales = np.abs(np.asarray(w)).reshape(L, 2, m // 2, n).max(2) / 7
    codes = np.rint(np.asarray(w) / np.repeat(scales, m // 2, 1)).astype(np.int8)
    return Grid(jax.device_put(codes, w.sharding), jax.numpy.asarray(scales), bits=4, tokens8=tokens8)
