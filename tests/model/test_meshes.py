"""The same numbers on one device and on eight, and every parameter where the rules put it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spectra_jax.model import parameters as trees
from spectra_jax.schema import Config, Data, Mesh, Model, Train
from spectra_jax.sharding import Rules, batch_sharding, make_mesh

# Three scale shards, which cut the matrices where no mesh below does.
SMALL = Model(V=32, D=16, F=24, L=2, N=6, K=6, H=4, scale_shards=3, attention_blocks=1)
B, T = 8, 5
MESHES = [Mesh(1, 1, 1), Mesh(1, 8, 1), Mesh(1, 4, 2), Mesh(2, 2, 2)]
WEIGHTS = ("float", "ternary", "bitnet158")


def mesh_of(mesh: Mesh, m: Model = SMALL) -> jax.sharding.Mesh:
    devices = jax.devices()[: mesh.slice * mesh.data * mesh.model]
    return make_mesh(
        Config(model=m, data=Data(T=T, batch=B), train=Train(loss_chunks=1), mesh=mesh), devices
    )


def specs_of(tree) -> dict[str, P]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.sharding.spec
        for path, leaf in leaves
    }


@pytest.fixture(scope="module")
def on_meshes(build):
    """Per weight rule the loss and its gradients on every mesh: one compilation a mesh for all."""
    models = {weight: dataclasses.replace(SMALL, weight=weight) for weight in WEIGHTS}
    built = {weight: build(m) for weight, m in models.items()}
    tokens = np.random.default_rng(0).integers(0, SMALL.V, (B, T + 1))

    def loss(graphdef, tree, tokens):
        logits = trees.apply(graphdef, tree)(tokens[:, :-1])
        here = (
            tokens[:, 1:, None] == jnp.arange(SMALL.V)[None, None]
        )  # a gather would need whole rows of logits
        return jnp.mean(
            jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(here, logits, 0), axis=-1)
        )

    found = []
    for mesh_shape in MESHES:
        mesh = mesh_of(mesh_shape)
        with jax.set_mesh(mesh):
            spread = {}
            for weight, m in models.items():
                like = jax.eval_shape(lambda key: trees.init_parameters(m, key), jax.random.key(0))
                spread[weight] = jax.tree.map(
                    lambda w, s: jax.device_put(w, NamedSharding(mesh, s.sharding.spec)),
                    built[weight][1],
                    like,
                )
            batch = jax.device_put(jnp.asarray(tokens), batch_sharding(mesh))

            @jax.jit
            def step(spread, batch):
                graphdefs = {weight: trees.graphdef_of(m) for weight, m in models.items()}
                return {
                    w: jax.value_and_grad(lambda p: loss(graphdefs[w], p, batch))(spread[w])
                    for w in WEIGHTS
                }

            found.append(step(spread, batch))
            for weight in WEIGHTS:  # gradients live where their parameters do
                assert specs_of(found[-1][weight][1]) == specs_of(spread[weight])
    return jax.device_get(found)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_four_meshes_give_one_answer(on_meshes, weight):
    """Sums are taken in another order, so the last bits may differ and no more.

    BitNet rounds activations to 8 bits: where the order of a sum carries one over a tie, it moves
    by 1/127 of its token's largest, and a gradient with it by about as much: hence its bound.
    """
    tolerance = 1e-2 if weight == "bitnet158" else 2e-6
    one, gradients = on_meshes[0][weight]
    assert 3 < one < 8
    for shape, other in zip(MESHES[1:], on_meshes[1:]):
        value, others = other[weight]
        np.testing.assert_allclose(value, one, rtol=tolerance, err_msg=str(shape))
        for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(gradients)):
            np.testing.assert_allclose(
                a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=str(shape)
            )


EXPECTED = {
    "embedding": P("model", "data"),
    "head": P("data", "model"),
    "norm.gain": P(None),
    "blocks.attention_norm.gain": P(None, None),
    "blocks.mlp_norm.gain": P(None, None),
    "blocks.attention.q.w": P(None, "data", "model"),
    "blocks.attention.k.w": P(None, "data", "model"),
    "blocks.attention.v.w": P(None, "data", "model"),
    "blocks.attention.o.w": P(None, "model", "data"),
    "blocks.mlp.gate.w": P(None, "data", "model"),
    "blocks.mlp.up.w": P(None, "data", "model"),
    "blocks.mlp.down.w": P(None, "model", "data"),
}


@pytest.fixture(scope="module")
def born():
    """Parameters made under jit on the mesh of all three axes."""
    with jax.set_mesh(mesh_of(Mesh(2, 2, 2))):
        return jax.jit(lambda key: trees.init_parameters(SMALL, key))(jax.random.key(0))


def test_parameters_are_born_with_their_sharding(born):
    """On the devices, not only in name: each holds its piece."""
    assert specs_of(born) == EXPECTED
    assert born["embedding"].addressable_shards[0].data.shape == (16, 8)
    assert born["blocks"]["mlp"]["down"]["w"].addressable_shards[0].data.shape == (2, 12, 8)


def test_frozen_codes_stay_where_the_latent_weights_were(born):
    m = dataclasses.replace(SMALL, weight="ternary")
    with jax.set_mesh(mesh_of(Mesh(2, 2, 2))):
        frozen = jax.jit(lambda p: trees.freeze(m, p))(born)
    alone = jax.jit(lambda p: trees.freeze(m, p))(jax.device_get(born))
    for (module, name), w in trees.block_matrices(frozen).items():
        assert w.codes.sharding.spec == EXPECTED[f"blocks.{module}.{name}.w"]
        assert w.scales.sharding.is_fully_replicated
        other = alone["blocks"][module][name]["w"]
        np.testing.assert_array_equal(w.codes, other.codes)
        np.testing.assert_allclose(w.scales, other.scales, rtol=1e-6)


def test_initial_weights_do_not_depend_on_the_mesh(born):
    alone = jax.jit(lambda key: trees.init_parameters(SMALL, key))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(born), jax.device_get(alone))


def test_rules_decide_where_parameters_live():
    rules = Rules(embed=None, vocab="data")
    with jax.set_mesh(mesh_of(Mesh(2, 2, 2))):
        like = jax.eval_shape(
            lambda key: trees.init_parameters(SMALL, key, rules), jax.random.key(0)
        )
    found = specs_of(like)
    assert found["embedding"] == P("data", None) and found["blocks.attention.o.w"] == P(
        None, "model", None
    )


def test_rules_that_collide_are_refused():
    with pytest.raises(
        ValueError, match=r"dims \('vocab', 'embed'\) map to mesh axes .*'data'.*'data'"
    ):
        trees.graphdef_of(SMALL, Rules(vocab="data"))
