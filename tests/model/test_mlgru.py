"""The MatMul-free LM against PyTorch in float64, written from the paper's equations (arXiv 2406.02528)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.model import parameters as trees
from spectra_jax.model.mlgru import recurrence
from spectra_jax.schema import Config, Data, Mesh, Model, Train
from spectra_jax.sharding import batch_sharding, make_mesh

SMALL = Model(
    V=24, D=12, F=20, L=3, N=2, K=2, H=6, mixer="mlgru", weight="bitlinear", quantized_head=True, norm_eps=1e-6,
    share_glu_scale=True, attention_blocks=1,
)
B, T = 2, 6
MESHES = [Mesh(1, 1, 1), Mesh(1, 4, 2), Mesh(2, 2, 2)]
TIES = []  # how far the float64 model's activations and weights stay from half-way between two codes


def through(x, rounded):
    """`rounded` forward, the identity backward."""
    return x + (rounded - x).detach()


def nearest(x):
    TIES.append(float((0.5 - (x.detach() - torch.round(x.detach())).abs()).min()))
    return torch.round(x)


def rms(x, gain):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * gain


def a8(x):
    s = 127 / torch.clamp(x.abs().amax(-1, keepdim=True), min=1e-5)
    return through(x, torch.clamp(nearest(x * s), -128, 127) / s)


def t(w):
    """Of one matrix, or of matrices that are one."""
    s = 1 / torch.clamp(w.abs().mean(), min=1e-5)
    return through(w, torch.clamp(nearest(w * s), -1, 1) / s)


def bit(x, p):
    """BitLinear, with matrices (in, out)."""
    return a8(rms(x, p.gain)) @ t(p.w)


def mixer(x, p, bound):
    i, f, g = (bit(x, p[name]["w"]) for name in "qkv")
    f = torch.sigmoid(f)
    f = f if bound is None else bound + (1 - bound) * f
    c = torch.nn.functional.silu(i) * (1 - f)
    h, states = torch.zeros_like(c[:, 0]), []
    for step in range(x.shape[1]):
        h = f[:, step] * h + c[:, step]
        states.append(h)
    out = rms(g, p["gate_norm"]["gain"]) * torch.nn.functional.silu(torch.stack(states, 1))
    return bit(out, p["o"]["w"])


def glu(x, p):
    gate, up, F = p["gate"]["w"], p["up"]["w"], p["gate"]["w"].w.shape[1]
    w = t(torch.cat([gate.w, up.w], 1))  # gate and up are one matrix
    g, u = a8(rms(x, gate.gain)) @ w[:, :F], a8(rms(x, up.gain)) @ w[:, F:]
    return bit(torch.nn.functional.silu(g) * u, p["down"]["w"])


def reference(m, parameters, tokens, targets):
    """Logits, the loss, and its gradients for every parameter, all in float64."""
    leaves, tree = jax.tree.flatten(parameters)
    leaves = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in leaves]
    p = jax.tree.unflatten(tree, leaves)
    shares = torch.softmax(p["blocks"]["attention"]["lower_bound"], 0)
    h = p["embedding"][torch.tensor(tokens)]
    for layer in range(m.L):
        block = jax.tree.map(lambda x: x[layer], p["blocks"])
        bound = shares[1 : layer + 1].sum(0) if layer else None
        h = h + mixer(rms(h, block["attention_norm"]["gain"]), block["attention"], bound)
        h = h + glu(rms(h, block["mlp_norm"]["gain"]), block["mlp"])
    logits = bit(rms(h, p["norm"]["gain"]), p["head"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    loss.backward()
    return logits.detach().numpy(), loss.item(), jax.tree.unflatten(tree, [x.grad.numpy() for x in leaves])


def loss_of(graphdef, parameters, tokens, targets):
    """Mean loss by the head's own product, and the logits."""
    tokens, targets = jnp.asarray(tokens), jnp.asarray(targets)
    logits = trees.apply(graphdef, parameters)(tokens)
    here = targets[..., None] == jnp.arange(logits.shape[-1])[None, None]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(here, logits, 0), axis=-1)), logits


def records(m, rows=B):
    return np.random.default_rng(0).integers(0, m.V, (rows, T + 1))


def test_logits_and_all_gradients(build):
    """No activation and no weight is so near to a tie that float32 could round it otherwise."""
    graphdef, parameters = build(SMALL, seed=12)
    tokens, targets = records(SMALL)[:, :-1], records(SMALL)[:, 1:]
    TIES.clear()
    logits64, loss64, gradients64 = reference(SMALL, parameters, tokens, targets)
    assert min(TIES) > 1e-4, "too near to a tie for float32"
    step = jax.jit(jax.value_and_grad(lambda p: loss_of(graphdef, p, tokens, targets), has_aux=True))
    (loss, logits), gradients = step(parameters)
    assert np.std(logits64) > 0.3
    np.testing.assert_allclose(logits, logits64, atol=1e-5 * np.abs(logits64).max())
    np.testing.assert_allclose(loss, loss64, rtol=1e-6)
    expected = dict(jax.tree_util.tree_leaves_with_path(gradients64))
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        g64 = expected[path]
        assert np.abs(g64).max() > 1e-5, path
        np.testing.assert_allclose(g, g64, atol=2e-5 * np.abs(g64).max(), err_msg=jax.tree_util.keystr(path))
    frozen = jax.jit(lambda p: loss_of(graphdef, p, tokens, targets)[1])(trees.freeze(SMALL, parameters))
    np.testing.assert_array_equal(frozen, logits)


@pytest.mark.parametrize("T", [1, 2, 13, 64])
def test_the_recurrence_is_the_sequential_one(T):
    """In float64, one token after the other, forward and backward; gates from nearly closed to nearly open."""
    rng = np.random.default_rng(T)
    f, i, g = 1 / (1 + np.exp(-4 * rng.standard_normal((3, T, 5)))), *rng.standard_normal((2, 3, T, 5))
    h, dh, df, di = np.zeros_like(f), np.zeros((3, 5)), np.zeros_like(f), np.zeros_like(f)
    for t in range(T):
        h[:, t] = (f[:, t] * h[:, t - 1] if t else 0) + i[:, t]
    for t in reversed(range(T)):
        dh = g[:, t] + (f[:, t + 1] * dh if t + 1 < T else 0)
        df[:, t], di[:, t] = dh * (h[:, t - 1] if t else 0), dh
    found, back = jax.vjp(jax.jit(recurrence), *(jnp.asarray(x, jnp.float32) for x in (f, i)))
    np.testing.assert_allclose(found, h, atol=2e-6 * np.abs(h).max())
    for mine, expected in zip(back(jnp.asarray(g, jnp.float32)), (df, di)):
        np.testing.assert_allclose(mine, expected, atol=2e-6 * max(np.abs(expected).max(), 1))


def test_lower_bounds(build):
    """None in the first layer, 1 - softmax(P)[0] in the last, and never falling in between."""
    m = replace(SMALL, L=5)
    graphdef, parameters = build(m, std=1.0)
    P = np.asarray(parameters["blocks"]["attention"]["lower_bound"], np.float64)
    found = np.asarray(trees.apply(graphdef, parameters).blocks.attention.over_layers())
    assert np.all(found[0] == 0) and np.all(np.diff(found, axis=0) > 0)
    np.testing.assert_allclose(found[-1], 1 - np.exp(P[0]) / np.exp(P).sum(0), rtol=1e-5)


def test_a_mixer_of_float_matrices_is_causal(build):
    """The other rules have it too; what a token's logits depend on, and remat and unrolling change nothing."""
    m = replace(SMALL, weight="float", quantized_head=False)
    graphdef, parameters = build(m)
    tokens = jnp.asarray(records(m))
    hidden = jax.jit(trees.apply(graphdef, parameters).hidden)
    plain = np.asarray(hidden(tokens))
    moved = np.abs(plain - hidden(tokens.at[:, 3].add(1))).max((0, 2))
    assert np.all(moved[:3] == 0) and np.all(moved[3:] > 1e-4)
    for changes in ({"remat": "full"}, {"unroll": 3}):
        other = trees.apply(trees.graphdef_of(replace(m, **changes)), parameters).hidden(tokens)
        np.testing.assert_allclose(other, plain, atol=1e-5)


@pytest.mark.parametrize("weight", ["ternary", "bitlinear"])
def test_meshes_give_one_answer(build, weight):
    """Where activations are rounded to 8 bits, the order of a sum may carry one over a tie: hence that bound."""
    m = replace(SMALL, weight=weight, D=16, N=4, K=4, H=4, F=24)
    graphdef, parameters = build(m)
    tokens, found = records(m, 8), []
    for mesh in MESHES:
        devices = jax.devices()[: mesh.slice * mesh.data * mesh.model]
        config = Config(model=m, data=Data(T=T, batch=8), train=Train(loss_chunks=1), mesh=mesh)
        spread = make_mesh(config, devices)
        with jax.set_mesh(spread):
            like = jax.eval_shape(lambda key: trees.init_parameters(m, key), jax.random.key(0))
            placed = jax.tree.map(
                lambda w, s: jax.device_put(w, NamedSharding(spread, s.sharding.spec)), parameters, like
            )
            batch = jax.device_put(jnp.asarray(tokens), batch_sharding(spread))
            step = jax.jit(jax.value_and_grad(lambda p, b: loss_of(graphdef, p, b[:, :-1], b[:, 1:])[0]))
            loss, gradients = step(placed, batch)
            assert jax.tree.map(lambda x: x.sharding.spec, gradients) == jax.tree.map(
                lambda x: x.sharding.spec, placed
            )
            found.append(jax.device_get((loss, gradients)))
    tolerance = 1e-2 if weight == "bitlinear" else 4e-6
    for loss, gradients in found[1:]:
        np.testing.assert_allclose(loss, found[0][0], rtol=tolerance)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(found[0][1])):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mixer=mlgru", "H=32"), r"N=8, K=8, H=32: .* N\*H must be D=512 .*; use N=K=8 and H=64"),
        (("mixer=mlgru", "K=4"), r"N=8, K=4, H=64: .* K must be N; use N=K=8 and H=64"),
        (("quantized_head=True", "tie_embeddings=True"), "a head that is the embedding stays float"),
    ],
)
def test_shapes_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        configs.override(Config(), [f"model.{text}" for text in overrides])


def test_unknown_mixer():
    with pytest.raises(UserError, match="config.model.mixer='mlgro' is not one of .*; did you mean mlgru"):
        trees.graphdef_of(replace(SMALL, mixer="mlgro"))
