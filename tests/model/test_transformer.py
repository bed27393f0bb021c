"""One transformer, many ways to run it: scanned or unrolled, rematerialised, latent or frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spectra_jax.errors import UserError
from spectra_jax.model import parameters as trees
from spectra_jax.model.transformer import Transformer, compute_dtype
from spectra_jax.schema import Model
from spectra_jax.weights.frozen import Frozen

SMALL = Model(V=29, D=16, F=24, L=2, N=4, K=2, H=4, scale_shards=2, attention_blocks=2)
B, T = 2, 7


def tokens_for(m: Model) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).integers(0, m.V, (B, T + 1)))


def loss(graphdef, tree, tokens):
    logits = trees.apply(graphdef, tree)(tokens[:, :-1])
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - target)


# --- causality ---


@pytest.mark.parametrize(
    ("weight", "attention"),
    [("float", "reference"), ("ternary", "causal_blocks"), ("bitnet158", "causal_blocks")],
)
def test_causality_by_gradient(build, weight, attention):
    """Logits at t have no gradient to the inputs after t, and some to each one up to t.

    All tokens differ, so that row t of the embedding is the input at t and nothing else.
    """
    m = dataclasses.replace(SMALL, weight=weight, attention=attention)
    graphdef, tree = build(m)
    tokens = jnp.arange(T)[None]
    readout = jnp.asarray(np.random.default_rng(1).standard_normal(m.V), jnp.float32)

    def read(embedding):
        return trees.apply(graphdef, {**tree, "embedding": embedding})(tokens)[0] @ readout

    jacobian = jax.jit(jax.jacrev(read))(tree["embedding"])[:, :T]  # (output at, input at, D)
    size = np.abs(np.asarray(jacobian)).max(-1)
    assert np.all(size[np.triu_indices(T, 1)] == 0)
    assert np.all(size[np.tril_indices(T)] > 1e-6)


# --- scan, unroll, remat ---


def test_scan_is_unrolled_is_rematerialised(build):
    """The same loss and gradients however the blocks are run; an `unroll` beyond L means L.

    The remat policies do what their names say: fewer bytes for the backward pass, as XLA counts.
    """
    m = Model(V=32, D=32, F=64, L=4, N=4, K=4, H=8, weight="ternary", attention_blocks=1)
    _, tree = build(m)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, m.V, (4, 65)))

    def step(**changes):
        graphdef = trees.graphdef_of(dataclasses.replace(m, **changes))
        run = jax.jit(jax.value_and_grad(lambda p: loss(graphdef, p, tokens))).lower(tree).compile()
        return run(tree), run.memory_analysis().temp_size_in_bytes

    (value, gradients), kept_by_scan = step()
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) > 1e-4
    kept = {}
    for changes in ({"unroll": 99}, {"remat": "full"}, {"remat": "dots"}):
        (other, others), kept[changes.get("remat")] = step(**changes)
        np.testing.assert_allclose(other, value, rtol=1e-6, err_msg=str(changes))
        for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(gradients)):
            bound = 2e-6 * float(jnp.abs(b).max())
            np.testing.assert_allclose(a, b, atol=bound, rtol=0, err_msg=str(changes))
    assert kept["full"] < 0.7 * kept_by_scan and kept["full"] < kept["dots"] < kept_by_scan


# --- frozen = training ---


@pytest.mark.parametrize(
    ("weight", "share"),
    [
        ("float", False),
        ("ternary", False),
        ("ternary", True),
        ("binary", True),
        ("bitnet158", False),
    ],
)
def test_frozen_logits_are_the_training_logits_bit_for_bit(build, weight, share):
    m = dataclasses.replace(SMALL, weight=weight, share_qkv_scale=share)
    graphdef, tree = build(m)
    tokens = tokens_for(m)[:, :-1]
    run = jax.jit(lambda p: trees.apply(graphdef, p)(tokens))
    frozen = jax.jit(lambda p: trees.freeze(m, p))(tree)
    matrices = trees.block_matrices(frozen)
    assert all(isinstance(w, Frozen) == (weight != "float") for w in matrices.values())
    np.testing.assert_array_equal(run(frozen), run(tree))


def test_frozen_parameters_hold_codes_scales_and_the_rest(build):
    m = dataclasses.replace(SMALL, weight="ternary")
    _, tree = build(m)
    frozen = trees.freeze(m, tree)
    for (module, name), w in trees.block_matrices(frozen).items():
        latent = tree["blocks"][module][name]["w"]
        assert w.codes.dtype == jnp.int8 and w.codes.shape == latent.shape
        assert w.scales.dtype == jnp.float32 and w.scales.shape == (m.L, m.scale_shards)
        assert w.axis == (0 if name in ("o", "down") else 1)  # o and down are cut by inputs
    for name in ("embedding", "head", "norm"):
        assert frozen[name] is tree[name]
    assert frozen["blocks"]["mlp_norm"]["gain"] is tree["blocks"]["mlp_norm"]["gain"]


def test_shared_scales_are_those_of_q_k_and_v_together(build):
    m = dataclasses.replace(SMALL, weight="ternary", share_qkv_scale=True)
    _, tree = build(m)
    matrices = trees.block_matrices(trees.freeze(m, tree))
    qkv = [np.asarray(tree["blocks"]["attention"][name]["w"], np.float64) for name in "qkv"]
    for layer in range(m.L):
        for shard in range(2):
            values = [np.split(w[layer], 2, axis=1)[shard].ravel() for w in qkv]
            expected = 1e-5 + np.abs(np.concatenate(values)).mean()
            for name in "qkv":
                found = matrices["attention", name].scales[layer, shard]
                np.testing.assert_allclose(found, expected, rtol=1e-6)


# --- precision and bad names ---


def test_low_precision_compute_keeps_logits_in_float32(build):
    m = dataclasses.replace(SMALL, compute_dtype="bfloat16", weight="ternary")
    graphdef, tree = build(m)
    tokens = tokens_for(m)[:, :-1]
    model = trees.apply(graphdef, tree)
    shapes = jax.eval_shape(lambda: (model.hidden(tokens), model(tokens)))
    assert [s.dtype for s in shapes] == [jnp.bfloat16, jnp.float32]
    assert compute_dtype(SMALL) == jnp.float32  # "auto" on a CPU
    gradients = jax.eval_shape(jax.grad(lambda p: loss(graphdef, p, tokens_for(m))), tree)
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat": "ful"}, "config.model.remat='ful' is not one of none, dots, full"),
        (
            {"attention": "flesh"},
            "config.model.attention='flesh' is not one of reference, causal_blocks",
        ),
        (
            {"weight": "terary"},
            "config.model.weight='terary' is not one of .*; did you mean ternary?",
        ),
    ],
)
def test_unknown_names(changes, message):
    m = dataclasses.replace(SMALL, **changes)
    with pytest.raises(UserError, match=message):
        trees.graphdef_of(m)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda key: Transformer(m, rngs=nnx.Rngs(key)), jax.random.key(0))
