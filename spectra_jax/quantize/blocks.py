"""One block of the model at a time, with what goes into each of its matrices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from spectra_jax.model.layers import rotary_tables
from spectra_jax.model.matrices import MATRICES, Key
from spectra_jax.model.transformer import Block
from spectra_jax.quantize.hessian import products
from spectra_jax.schema import Model
from spectra_jax.sharding import Rules

# Matrix -> the first of those that read the same input.
INPUT_OF: dict[Key, Key] = {key: key for key in MATRICES} | {
    ("attention", "k"): ("attention", "q"), ("attention", "v"): ("attention", "q"), ("mlp", "up"): ("mlp", "gate"),
}
NO_SCALES = dict.fromkeys(MATRICES)  # float weights have none


class _Tap:
    """A matrix that also keeps what it is applied to, under its key."""

    def __init__(self, linear: Any, kept: dict[Key, Array], key: Key):
        self.linear, self.kept, self.key = linear, kept, key

    def __call__(self, x: Array, *rest: Any) -> Array:
        self.kept[self.key] = x
        return self.linear(x, *rest)


class Blocks:
    """The blocks of a model by their parameters: those of one layer, latent or in stored forms."""

    def __init__(self, m: Model, rules: Rules = Rules()):
        graphdef = nnx.graphdef(jax.eval_shape(lambda key: Block(m, rules, rngs=nnx.Rngs(key)), jax.random.key(0)))

        def run(parameters: PyTree, x: Array) -> tuple[Array, dict[Key, Array]]:
            block, kept = nnx.merge(graphdef, parameters), {}
            for module, name in MATRICES:
                part = getattr(block, module)
                setattr(part, name, _Tap(getattr(part, name), kept, (module, name)))
            return block(x, rotary_tables(x.shape[1], m.H, m.rope_base), NO_SCALES, None), kept

        self._run = run
        self._forward = jax.jit(lambda parameters, x: run(parameters, x)[0])
        self._inputs = jax.jit(lambda parameters, x: run(parameters, x)[1])
        self._products = jax.jit(self._sum, static_argnums=3)

    def forward(self, parameters: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream after the block."""
        return self._forward(parameters, x)

    def inputs(self, parameters: PyTree, x: Float[Array, "B T D"]) -> dict[Key, Float[Array, "B T _"]]:
        """What each matrix is applied to."""
        return self._inputs(parameters, x)

    def hessians(
        self, parameters: PyTree, batches: list[Float[Array, "B T D"]], keys: tuple[Key, ...]
    ) -> dict[Key, Float[Array, "m m"]]:
        """2/sequences times the sum of x x^T over all tokens, of the inputs of each of `keys`."""
        wanted = tuple(dict.fromkeys(INPUT_OF[key] for key in keys))
        sums = None
        for x in batches:
            sums = self._products(parameters, x, sums, wanted)
        share = 2 / sum(x.shape[0] for x in batches)
        return {key: sums[INPUT_OF[key]] * share for key in keys}

    def _sum(self, parameters: PyTree, x: Array, sums: dict | None, keys: tuple[Key, ...]) -> dict[Key, Array]:
        kept = self._run(parameters, x)[1]
        new = {key: products(kept[key]) for key in keys}
        return new if sums is None else jax.tree.map(jnp.add, sums, new)
