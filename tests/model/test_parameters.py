"""The parameter tree: names, counts and initial values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.model import parameters as trees
from spectra_jax.schema import Model

SMALL = Model(V=96, D=32, F=48, L=3, N=4, K=2, H=8)


def shapes_of(m: Model) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda key: trees.init_parameters(m, key), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves
    }


EXPECTED = {
    "embedding": (96, 32),
    "head": (32, 96),
    "norm.gain": (32,),
    "blocks.attention_norm.gain": (3, 32),
    "blocks.mlp_norm.gain": (3, 32),
    "blocks.attention.q.w": (3, 32, 32),
    "blocks.attention.k.w": (3, 32, 16),
    "blocks.attention.v.w": (3, 32, 16),
    "blocks.attention.o.w": (3, 32, 32),
    "blocks.mlp.gate.w": (3, 32, 48),
    "blocks.mlp.up.w": (3, 32, 48),
    "blocks.mlp.down.w": (3, 48, 32),
}


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, set()),
        ({"weight": "ternary"}, set()),
        ({"tie_embeddings": True}, {"head"}),
        ({"weight": "bitnet158"}, {"blocks.attention_norm.gain", "blocks.mlp_norm.gain"}),
    ],
)
def test_names_shapes_and_count(changes, absent):
    m = dataclasses.replace(SMALL, **changes)
    shapes = shapes_of(m)
    assert shapes == {name: shape for name, shape in EXPECTED.items() if name not in absent}
    found = trees.count(m)
    assert found.total == sum(int(np.prod(shape)) for shape in shapes.values())
    assert found.linear == sum(int(np.prod(s)) for n, s in shapes.items() if n.endswith(".w"))
    assert found.norm == sum(int(np.prod(s)) for n, s in shapes.items() if n.endswith(".gain"))


def test_initial_values():
    """Normal with `init_std`, o and down narrower by sqrt(2L); every layer its own draw."""
    m = dataclasses.replace(SMALL, init_std=0.05)
    tree = jax.jit(lambda key: trees.init_parameters(m, key))(jax.random.key(1))
    wide, narrow = 0.05, 0.05 / np.sqrt(2 * 3)
    for (_, name), w in trees.block_matrices(tree).items():
        expected = narrow if name in ("o", "down") else wide
        # the deviation of n draws is within 4 of its own standard errors, 1/sqrt(2n)
        assert np.std(w) == pytest.approx(expected, rel=4 / np.sqrt(2 * w.size))
        assert abs(np.mean(w)) < 4 * expected / np.sqrt(w.size)
        assert not np.allclose(w[0], w[1])
    for w in (tree["embedding"], tree["head"]):
        assert np.std(w) == pytest.approx(wide, rel=4 / np.sqrt(2 * w.size))
    assert not np.allclose(tree["blocks"]["mlp"]["gate"]["w"], tree["blocks"]["mlp"]["up"]["w"])
    for gain in (tree["norm"]["gain"], tree["blocks"]["mlp_norm"]["gain"]):
        np.testing.assert_array_equal(gain, np.ones_like(gain))


def test_residual_scaling_can_be_switched_off():
    m = dataclasses.replace(SMALL, init_residual_scaling=False)
    w = trees.init_parameters(m, jax.random.key(0))["blocks"]["mlp"]["down"]["w"]
    assert np.std(w) == pytest.approx(m.init_std, rel=4 / np.sqrt(2 * w.size))


def test_graphdef_is_static():
    """Equal for equal shapes and hashable: as a static argument it does not recompile."""
    assert trees.graphdef_of(SMALL) == trees.graphdef_of(dataclasses.replace(SMALL))
    assert hash(trees.graphdef_of(SMALL)) == hash(trees.graphdef_of(dataclasses.replace(SMALL)))
    assert trees.graphdef_of(SMALL) != trees.graphdef_of(
        dataclasses.replace(SMALL, weight="ternary")
    )


def test_a_tree_of_another_shape_is_refused():
    """A model without norms does not take the parameters of one with them."""
    tree = jax.eval_shape(lambda key: trees.init_parameters(SMALL, key), jax.random.key(0))
    graphdef = trees.graphdef_of(dataclasses.replace(SMALL, weight="bitnet158"))
    with pytest.raises(ValueError):
        trees.apply(graphdef, tree)
