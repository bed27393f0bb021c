"""SmoothQuant and LLM.int8(): the scales, what folding them leaves as it was, and bitsandbytes' product."""

from dataclasses import replace

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import drawn, logits, tiny, trained

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import init_parameters
from spectra_jax.quantize.blocks import Blocks
from spectra_jax.quantize.methods import get_method
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.quantize.smooth import OUTLIER, smooth, smoothing, w8a8
from spectra_jax.schema import Model, Quantize
from spectra_jax.weights.frozen import matmul

SHAPE = Model(V=16, D=32, F=64, L=1, N=4, K=2, H=8, unroll=1, attention_blocks=2, compute_dtype="float32")
INT8 = Quantize(method="smoothquant", bits=8, grid="absmax", group=0, scale_dtype="float32")


def a_block(seed=0):
    """The parameters of a block and two batches of what goes into it, with two dims of large magnitude."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: init_parameters(SHAPE, key), jax.random.key(0))
    parameters = jax.tree.map(lambda leaf: leaf[0], drawn(shapes, seed)["blocks"])
    for norm, at in (("attention_norm", 5), ("mlp_norm", 9)):
        parameters[norm]["gain"] = parameters[norm]["gain"].at[at].mul(60.0)
    return parameters, [jnp.asarray(rng.standard_normal((2, 16, 32)), jnp.float32) for _ in range(2)]


@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_scales(alpha):
    rng = np.random.default_rng(0)
    largest, ws = rng.lognormal(0, 1, 6), [rng.standard_normal((6, n)) for n in (3, 5)]
    largest[2], ws[0][4], ws[1][4] = 0, 0, 0
    found = smoothing(jnp.asarray(largest, jnp.float32), [jnp.asarray(w, jnp.float32) for w in ws], alpha)
    weights = np.maximum(np.abs(np.concatenate(ws, axis=1)).max(axis=1), 1e-5)
    np.testing.assert_allclose(found, np.maximum(largest**alpha / weights ** (1 - alpha), 1e-5), rtol=1e-5)


def test_smoothing_changes_ranges_and_nothing_else():
    parameters, batches = a_block()
    blocks = Blocks(SHAPE)
    even = smooth(parameters, batches, blocks, INT8)
    for x in batches:
        before, after = blocks.forward(parameters, x), blocks.forward(even, x)
        print("change of the block's output:", float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before))))
        np.testing.assert_allclose(after, before, atol=1e-5 * float(jnp.max(jnp.abs(before))))
    # With alpha = 1/2 the range of each input dim is that of its weights: the difficulty is shared.
    for key, module, names in ((("attention", "q"), "attention", "qkv"), (("mlp", "gate"), "mlp", ("gate", "up"))):
        x = np.max([np.abs(blocks.inputs(even, x)[key]).max(axis=(0, 1)) for x in batches], axis=0)
        w = np.max([np.abs(even[module][name]["w"]).max(axis=1) for name in names], axis=0)
        np.testing.assert_allclose(x, w, rtol=1e-4)
        first = np.max([np.abs(blocks.inputs(parameters, x)[key]).max(axis=(0, 1)) for x in batches], axis=0)
        assert first.max() / np.median(first) > 20 and x.max() / np.median(x) < 10
    for module, name in (("attention", "o"), ("mlp", "down")):
        assert even[module][name]["w"] is parameters[module][name]["w"]


def test_smoothing_is_what_8_bit_activations_need():
    parameters, batches = a_block()
    blocks, errors = Blocks(SHAPE), {}
    for alpha in (0.0, 0.5):
        q = replace(INT8, alpha=alpha)
        prepared = parameters if not alpha else smooth(parameters, batches, blocks, q)
        frozen = {
            module: {name: {"w": w8a8(part["w"], None, q)} for name, part in prepared[module].items()}
            for module in ("attention", "mlp")
        }
        found = [blocks.forward(prepared | frozen, x) - blocks.forward(parameters, x) for x in batches]
        errors[alpha] = float(jnp.sqrt(jnp.mean(jnp.square(jnp.stack(found)))))
    print(errors)
    assert errors[0.5] < 0.5 * errors[0.0]


@pytest.mark.parametrize("threshold", [0.0, OUTLIER])
def test_products_are_those_of_bitsandbytes(threshold):
    rng = np.random.default_rng(1)
    w = (rng.standard_normal((96, 128)) * 0.05).astype(np.float16)  # (out, in)
    x = rng.standard_normal((3, 7, 128)).astype(np.float16)
    x[:, :, 17], x[1, 2, 40], x[0, 0, 3] = x[:, :, 17] * 20, 9.0, 6.0
    layer = bnb.nn.Linear8bitLt(128, 96, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(torch.from_numpy(w), requires_grad=False, has_fp16_weights=False)
    with torch.no_grad():
        theirs = layer.to("cpu").eval()(torch.from_numpy(x)).float().numpy()
    grid = w8a8(jnp.asarray(w.T, jnp.float32), None, INT8, threshold=threshold)
    # It multiplies by 127 / absmax where we divide by absmax / 127: a few 16-bit weights lie on a midpoint.
    off = np.abs(np.asarray(grid.codes.T, np.int32) - layer.state.CB.numpy())
    print("codes that differ:", np.mean(off > 0))
    assert off.max() <= 1 and np.mean(off > 0) < 1e-3
    np.testing.assert_allclose(grid.scales[0] * 127, layer.state.SCB.numpy(), rtol=1e-6)
    found = matmul(jnp.asarray(x, jnp.float32), grid)
    gap = np.abs(found - theirs).max() / np.abs(theirs).max()
    print("threshold", threshold, "largest difference:", gap)
    assert gap < 1e-3  # theirs is rounded to 16 bits
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    without = np.abs(matmul(jnp.asarray(x, jnp.float32), replace(grid, threshold=0.0)) - exact).mean()
    error = np.abs(found - exact).mean()
    print("error", error, "without a threshold", without)
    assert error < 0.5 * without if threshold else error == without


def test_an_independent_llm_int8():
    rng = np.random.default_rng(2)
    w, x = rng.standard_normal((24, 10)), rng.standard_normal((5, 24))
    x[2, 7], x[4, 11] = 8.0, -6.0
    scale = np.abs(w).max(axis=0) / 127
    outlier = (np.abs(x) >= 6).any(axis=0)
    inner = np.where(outlier, 0, x)
    step = np.abs(inner).max(axis=1, keepdims=True) / 127
    rounded = np.where(outlier, x, np.round(inner / step) * step)
    expected = rounded @ (np.round(w / scale) * scale)
    grid = get_method("llm_int8", "absmax").matrix(jnp.asarray(w, jnp.float32), None, INT8, "matrix")
    np.testing.assert_allclose(matmul(jnp.asarray(x, jnp.float32), grid), expected, rtol=1e-4, atol=1e-4)
    assert grid.stored_bits() == 8 * 240 + 32 * 10


def test_groups_that_do_not_divide():
    with pytest.raises(UserError, match=r"group=7 does not divide the 32 inputs of matrix; use 8"):
        w8a8(jnp.ones((32, 8)), None, Quantize(bits=8, grid="absmax", group=7))


@pytest.mark.parametrize("method", [pytest.param("smoothquant", marks=pytest.mark.slow), "llm_int8"])
def test_a_model(tmp_path, method):
    run, out = trained(), tmp_path / "run"
    settings = ("bits=8", "group=0", "grid=absmax", "samples=16", "batch=8", f"method={method}")
    quantize(str(run), configs.override(tiny(), [f"quantize.{setting}" for setting in settings]), out)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    before, after = logits(run, tokens), logits(out, tokens)
    gap = np.abs(after - before).max() / np.abs(before).max()
    print(method, "relative change of logits:", gap)
    assert 1e-5 < gap < 0.01
