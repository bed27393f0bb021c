"""AWQ: the search for scales and bounds against a block of its own in float64, and what folding leaves as it was."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drawn, logits, tiny, trained

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import init_parameters
from spectra_jax.quantize import awq
from spectra_jax.quantize.blocks import Blocks
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.quantize.rtn import rtn
from spectra_jax.schema import Model, Quantize
from spectra_jax.sharding import AXES

SHAPE = Model(V=16, D=32, F=64, L=1, N=4, K=4, H=8, unroll=1, attention_blocks=2, compute_dtype="float32")
SHARED = replace(SHAPE, K=2)  # two heads of queries for one of keys and values
Q = Quantize(method="awq", bits=3, grid="awq", group=16, scale_dtype="float32")
MODULES = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


blocks_of = functools.cache(Blocks)  # programs are compiled once for each


@functools.cache
def scales_of(shape):
    """The search on `a_block`."""
    return awq.search(*a_block(shape), blocks_of(shape), Q)


def a_block(shape, seed=0):
    """The parameters of a block whose norms make some dims large, and two batches of what goes into it."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init_parameters(shape, key), jax.random.key(0))
    parameters = jax.tree.map(lambda leaf: leaf[0], drawn(shapes, seed)["blocks"])
    for norm in ("attention_norm", "mlp_norm"):
        parameters[norm]["gain"] *= rng.lognormal(0, 1.2, 32).astype(np.float32)
    return parameters, [jnp.asarray(rng.standard_normal((2, 16, 32)), jnp.float32) for _ in range(2)]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def in_float64(parameters, x, shape):
    """What each matrix is applied to, and the outputs of attention and MLP, by textbook formulas."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    x, found = np.asarray(x, np.float64), {}
    (B, T, _), H = x.shape, shape.H
    norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + shape.norm_eps) * p[name]["gain"]  # noqa: E731
    found["q"] = found["k"] = found["v"] = normed = norm(x, "attention_norm")
    q, k, v = ((normed @ p["attention"][n]["w"]).reshape(B, T, -1, H) for n in "qkv")
    angle = np.outer(np.arange(T), shape.rope_base ** (-np.arange(0, H, 2) / H))[None, :, None]

    def turned(z):
        a, b = np.split(z, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    k, v = (np.repeat(z, shape.N // shape.K, axis=2) for z in (turned(k), v))
    scores = np.einsum("bqnh,bknh->bnqk", turned(q), k) / np.sqrt(H)
    weights = softmax(np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf))
    found["o"] = np.einsum("bnqk,bknh->bqnh", weights, v).reshape(B, T, -1)
    attention = found["o"] @ p["attention"]["o"]["w"]
    found["gate"] = found["up"] = normed = norm(x + attention, "mlp_norm")
    gate = normed @ p["mlp"]["gate"]["w"]
    found["down"] = gate / (1 + np.exp(-gate)) * (normed @ p["mlp"]["up"]["w"])
    return found, {"attention": attention, "mlp": found["down"] @ p["mlp"]["down"]["w"]}


def rounded(w, group=16, bits=3, grid="awq"):
    """AWQ's asymmetric grid or SmoothQuant's, in float64, in its own layout: groups of a row of (out, in)."""
    rows = w.T.reshape(-1, group)
    if grid == "absmax":
        high = 2 ** (bits - 1) - 1
        scale = np.abs(rows).max(1, keepdims=True) / high
        return (np.clip(np.round(rows / scale), -high, high) * scale).reshape(w.shape[::-1]).T
    low, high, steps = rows.min(1, keepdims=True), rows.max(1, keepdims=True), 2**bits - 1
    scale = np.maximum(high - low, 1e-5) / steps
    zero = np.clip(-np.round(low / scale), 0, steps)
    return ((np.clip(np.round(rows / scale) + zero, 0, steps) - zero) * scale).reshape(w.shape[::-1]).T


def with_weights(parameters, module, changed):
    part = parameters[module] | {name: {"w": w} for name, w in changed.items()}
    return parameters | {module: part}


@pytest.mark.parametrize(
    "source, module, names",
    [
        ("attention_norm", "attention", ("q", "k", "v")),
        (("attention", "v"), "attention", ("o",)),
        ("mlp_norm", "mlp", ("gate", "up")),
        (("mlp", "up"), "mlp", ("down",)),
    ],
)
def test_the_search_for_scales(source, module, names):
    parameters, batches = a_block(SHAPE)
    runs = [in_float64(parameters, x, SHAPE) for x in batches]
    magnitude = np.mean([np.abs(found[names[0]]).mean(axis=(0, 1)) for found, _ in runs], axis=0)
    losses, tried = [], []
    for k in range(20):
        s = np.maximum(magnitude ** (k / 20), 1e-4)
        s = (s / np.sqrt(s.max() * s.min()))[:, None]
        ws = {name: np.asarray(parameters[module][name]["w"], np.float64) for name in names}
        changed = with_weights(parameters, module, {name: rounded(w * s) / s for name, w in ws.items()})
        outputs = [in_float64(changed, x, SHAPE)[1][module] for x in batches]
        losses.append(np.mean([(a - b[1][module]) ** 2 for a, b in zip(outputs, runs)]))
        tried.append(s[:, 0])
    losses, keys = np.asarray(losses), tuple((module, name) for name in names)
    found = awq.candidates(jnp.asarray(magnitude, jnp.float32))
    np.testing.assert_allclose(found, tried, rtol=2e-5)
    ours = np.mean([awq._losses(blocks_of(SHAPE), keys, Q, parameters, x, found) for x in batches], axis=0)
    print(source, "losses differ by", np.max(np.abs(ours / losses - 1)), "best:", np.argmin(losses))
    np.testing.assert_allclose(ours, losses, rtol=5e-3)
    np.testing.assert_allclose(scales_of(SHAPE)[source], tried[int(np.argmin(losses))], rtol=2e-5)


# With AWQ's grid, bounds on both sides put the zero point on a midpoint, and the last bit decides.
@pytest.mark.parametrize("grid, agreement", [("absmax", 1.0), ("awq", 0.97)])
def test_the_search_for_bounds(grid, agreement):
    parameters, batches = a_block(SHAPE)
    same = []
    inputs = [in_float64(parameters, x, SHAPE)[0] for x in batches]
    clipped, cut = awq.clip(parameters, batches, blocks_of(SHAPE), replace(Q, grid=grid)), 0
    shrinks = 1 - np.arange(10) / 20
    for module, names in MODULES.items():
        for name in names:
            w = np.asarray(parameters[module][name]["w"], np.float64)
            found = np.asarray(clipped[module][name]["w"])
            if name in "qk":
                np.testing.assert_array_equal(found, w)
                continue
            x = np.concatenate([each[name].reshape(-1, len(w)) for each in inputs])
            for g in range(0, len(w), 16):
                part, rows = w[g : g + 16], x[:, g : g + 16]
                bounds = np.abs(part).max(axis=0) * shrinks[:, None]
                changes = [rounded(np.clip(part, -bound, bound), grid=grid) - part for bound in bounds]
                best = np.argmin([np.mean((rows @ change) ** 2, axis=0) for change in changes], axis=0)
                bound = bounds[best, np.arange(part.shape[1])]
                same.append(np.isclose(found[g : g + 16], np.clip(part, -bound, bound), rtol=1e-5, atol=1e-7))
                cut += np.sum(best > 0)
    agree = np.mean(np.concatenate(same, axis=None))
    print(grid, "weights that agree:", agree, "groups that are clipped:", cut)
    assert agree >= agreement and cut > 100


def test_at_most_512_tokens_are_looked_at(monkeypatch):
    parameters, batches = a_block(SHAPE)
    monkeypatch.setattr(awq, "CLIP_TOKENS", 20)  # of 64: every fourth
    clipped = awq.clip(parameters, batches, blocks_of(SHAPE), Q)
    inputs = [blocks_of(SHAPE).inputs(parameters, x)["mlp", "down"].reshape(-1, 64) for x in batches]
    every = awq._clipped(parameters["mlp"]["down"]["w"], jnp.concatenate(inputs), Q)
    expected = awq._clipped(parameters["mlp"]["down"]["w"], jnp.concatenate(inputs)[::4], Q)
    np.testing.assert_array_equal(clipped["mlp"]["down"]["w"], expected)
    assert not np.array_equal(every, expected)


@pytest.mark.parametrize("shape", [SHAPE, SHARED])
def test_folding_leaves_the_block_as_it_was(shape):
    parameters, batches = a_block(shape)
    blocks = blocks_of(shape)
    scales = scales_of(shape)
    assert set(scales) == set(awq.FOLDS) - ({("attention", "v")} if shape is SHARED else set())
    assert all(float(jnp.max(s) / jnp.min(s)) > 1.05 for s in scales.values())
    folded = awq.fold(parameters, scales)
    for x in batches:
        before, after = blocks.forward(parameters, x), blocks.forward(folded, x)
        change = float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))
        print("change of the block's output:", change)
        assert 0 < change < 1e-5
        np.testing.assert_allclose(after - x, sum(in_float64(parameters, x, shape)[1].values()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [SHAPE, SHARED])
def test_it_is_better_than_rounding_alone(shape):
    parameters, batches = a_block(shape)
    blocks, errors = blocks_of(shape), {}
    fresh = a_block(shape, seed=7)[1]
    for kind, prepared in (("rtn", parameters), ("awq", awq.scale_and_clip(parameters, batches, blocks, Q))):
        frozen = {
            module: {name: {"w": rtn(prepared[module][name]["w"], None, Q)} for name in names}
            for module, names in MODULES.items()
        }
        found = [blocks.forward(prepared | frozen, x) - blocks.forward(parameters, x) for x in fresh]
        errors[kind] = float(jnp.sqrt(jnp.mean(jnp.square(jnp.stack(found)))))
    print(errors)
    assert errors["awq"] < 0.9 * errors["rtn"]


@pytest.mark.slow  # over 20 seconds where a core is shared
def test_on_a_mesh_as_on_one_device():
    parameters, batches = a_block(SHAPE)
    q = replace(Q, grid="absmax")
    alone = awq.scale_and_clip(parameters, batches, blocks_of(SHAPE), q)
    mesh = jax.make_mesh((1, 2, 2), AXES, devices=jax.devices()[:4])
    spread = lambda x, *spec: jax.device_put(np.asarray(x), jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    with jax.set_mesh(mesh):
        placed = jax.tree.map(spread, parameters)
        for module, names in MODULES.items():
            for name in names:
                spec = ("model", "data") if name in ("o", "down") else ("data", "model")
                placed[module][name]["w"] = spread(parameters[module][name]["w"], *spec)
        found = awq.scale_and_clip(placed, [spread(x, ("slice", "data")) for x in batches], Blocks(SHAPE), q)
        specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (placed, found))
        assert specs[0] == specs[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), found, alone)


def test_groups_that_do_not_divide():
    parameters, batches = a_block(SHAPE)
    with pytest.raises(UserError, match=r"group=24 does not divide the 32 inputs of attention.q; use"):
        awq.scale_and_clip(parameters, batches, blocks_of(SHAPE), replace(Q, group=24))


@pytest.mark.slow  # over 20 seconds where a core is shared
def test_a_model(tmp_path):
    run, out = trained(), tmp_path / "run"
    settings = ("method=awq", "bits=4", "group=16", "grid=awq", "samples=16", "batch=8")
    quantize(str(run), configs.override(tiny(), [f"quantize.{setting}" for setting in settings]), out)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    before, after = logits(run, tokens), logits(out, tokens)
    gap = np.abs(after - before).max() / np.abs(before).max()
    print("relative change of logits:", gap)
    assert 1e-4 < gap < 0.05
