"""The stored form of a matrix: what it expands to, and that it travels through JAX as a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.weights import get_rule
from spectra_jax.weights.frozen import Frozen, expand, matmul
from spectra_jax.weights.rule import Shards


@pytest.mark.parametrize("axis", [0, 1])
def test_expand(axis):
    shape = (6, 9)
    line = np.repeat([1.0, 2.0, 3.0], shape[axis] // 3)
    found = expand(jnp.asarray([1.0, 2.0, 3.0]), shape, axis)
    np.testing.assert_array_equal(found, line[:, None] if axis == 0 else line[None])
    assert expand(jnp.asarray([7.0]), shape, axis).shape == (1, 1)


def test_product():
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(-1, 2, (6, 4)).astype(np.int8), np.float32([0.5, 2.0])
    x = rng.standard_normal((2, 3, 6)).astype(np.float32)
    for axis, dense in (
        (0, codes * np.repeat(scales, 3)[:, None]),
        (1, codes * np.repeat(scales, 2)[None]),
    ):
        frozen = Frozen(jnp.asarray(codes), jnp.asarray(scales), axis)
        np.testing.assert_array_equal(frozen.dequantize(), dense)
        np.testing.assert_allclose(
            matmul(jnp.asarray(x), frozen), x.astype(np.float64) @ dense, rtol=1e-5, atol=1e-6
        )
        low = matmul(jnp.asarray(x, jnp.bfloat16), frozen)
        assert low.dtype == jnp.bfloat16


def test_it_is_a_pytree_of_codes_and_scales():
    frozen = Frozen(jnp.ones((4, 4), jnp.int8), jnp.ones((2,)), 1)
    leaves, tree = jax.tree.flatten(frozen)
    assert [leaf.dtype for leaf in leaves] == [jnp.int8, jnp.float32]
    assert jax.tree.unflatten(tree, leaves).axis == 1
    assert jax.tree.structure(Frozen(*leaves, axis=0)) != tree  # the axis is part of the structure
    shapes = jax.eval_shape(lambda f: f, frozen)
    assert shapes.codes.shape == (4, 4)
    assert jax.tree.map(lambda leaf: leaf.ndim, frozen).scales == 1
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(frozen)]
    assert paths == [".codes", ".scales"]


@pytest.mark.parametrize("name", ["ternary", "binary", "bitnet158"])
def test_stacked_layers_are_each_layer_alone(name):
    rng, rule, shards = np.random.default_rng(1), get_rule(name), Shards(2, 0)
    ws = jnp.asarray(rng.standard_normal((3, 8, 6)), jnp.float32)

    def freeze(w):
        return rule.freeze(w, rule.statistics([w], shards), shards)

    stacked = jax.vmap(freeze)(ws)
    assert stacked.codes.shape == (3, 8, 6) and stacked.scales.shape == (3, 2)
    for layer, w in enumerate(ws):
        alone = freeze(w)
        np.testing.assert_array_equal(stacked.codes[layer], alone.codes)
        np.testing.assert_array_equal(stacked.scales[layer], alone.scales)
