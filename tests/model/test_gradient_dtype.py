"""Gradients of weights in float32 from the product on: what is lowered, and how near they are to exact ones."""

import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, T, drawn, on_mesh

from spectra_jax import config as configs
from spectra_jax.model.parameters import graphdef_of, init_parameters
from spectra_jax.schema import Config, Model
from spectra_jax.sharding import Rules, batch_sharding
from spectra_jax.stored import abstract
from spectra_jax.train.objective import batch_loss
from spectra_jax.weights import get_rule
from spectra_jax.weights.frozen import matmul
from spectra_jax.weights.gather import Gathered, Gathering
from spectra_jax.weights.rule import Shards

LOW = ("model.K=4", "model.compute_dtype=bfloat16")
WIDE = (*LOW, "model.gradient_dtype=float32")


def prepared(*overrides: str, devices: int | None = None):
    """The gradient of the loss as a jitted function, what it is called with, and the mesh, if there are `devices`."""
    config = configs.override(Config(), [*TINY, "data.batch=64", *overrides])
    # Few ids, so that the gradient of each is a sum of many rows.
    tokens = np.random.default_rng(0).integers(0, 4, (config.data.batch, T + 1)).astype(np.int32)
    config, mesh = on_mesh(config, 1, devices, 1) if devices else (config, None)
    with jax.set_mesh(mesh) if mesh else nullcontext():
        graphdef = graphdef_of(config.model)
        like = jax.eval_shape(lambda: init_parameters(config.model, jax.random.key(0)))
        parameters = drawn(like)
        if mesh:
            places = jax.tree.map(lambda x: x.sharding, abstract(like, mesh))
            parameters, tokens = jax.device_put((parameters, tokens), (places, batch_sharding(mesh)))
    run = jax.jit(jax.value_and_grad(lambda p, t: batch_loss(graphdef, p, t, 1)))
    return run, (parameters, tokens), mesh


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("weight", ["float", "ternary", "ternary gathered whole"])
def test_what_is_summed_over_devices(weight, remat):
    """Of the lowered program: libtpu sums what a product leaves, XLA:CPU sums bfloat16 in float32 anyhow."""
    weight, *whole = weight.split(maxsplit=1)
    how = (f"model.weight={weight}", f"model.remat={remat}", f"model.gather={'matrix' if whole else 'codes'}")
    for overrides, dtype in ((LOW, "bf16"), (WIDE, "f32")):
        run, arguments, mesh = prepared(*overrides, *how, devices=8)
        with jax.set_mesh(mesh):
            text = run.lower(*arguments).as_text()
        products = re.findall(r"stablehlo\.dot_general .* -> tensor<(\d+)x(\d+)x(b?f\d\d)>", text)
        # q, k, v and o; gate, up and down (JAX's own derivative has them transposed). Activations have 1024 rows.
        found = sorted((*sorted((int(m), int(n))), kind) for m, n, kind in products if int(m) <= 64 and int(n) <= 64)
        assert found == [(32, 32, dtype)] * 4 + [(32, 64, dtype)] * 3
        (embedding,) = re.findall(r'"stablehlo\.scatter".*?\}\) : \(.*?\) -> tensor<304x32x(\w+)>', text, re.DOTALL)
        # The embedding's sum and the head's product never were in anything else.
        assert embedding == "f32"
        assert ("32", "304", "f32") in products


@pytest.mark.parametrize("weight", ["float", "ternary"])
def test_one_product_against_float64(weight):
    """Half of bfloat16's last digit, or nothing of it."""
    rng, rule, m, n = np.random.default_rng(1), get_rule(weight), 32, 48
    x, g = (jnp.asarray(rng.standard_normal((16, 8, size)), jnp.bfloat16) for size in (m, n))
    w = jnp.asarray(rng.standard_normal((m, n)), jnp.float32)
    exact = np.einsum("btm,btn->mn", np.asarray(x, np.float64), np.asarray(g, np.float64))
    statistics = rule.statistics([w], Shards()) if rule.quantized else None
    effective = w if statistics is None else rule.freeze(w, statistics, Shards()).dequantize()
    matrix = np.asarray(effective.astype(jnp.bfloat16), np.float64)
    exact_dx = np.einsum("btn,mn->btm", np.asarray(g, np.float64), matrix)
    errors, rules = {}, Rules()
    with jax.set_mesh(on_mesh(configs.override(Config(), [*TINY]), 1, 8, 1)[1]):
        spec = rules("batch", "time", "ffn")
        places = rules("batch", "time", "act"), spec, rules("embed", "ffn")
        x, g, w = (jax.device_put(a, place) for a, place in zip((x, g, w), places))

        def backward(x, w, g, how):
            def product(x, w):
                form = Gathered.of(rule, w, statistics, Shards(), how) if rule.quantized else Gathered(w, None, how)
                return matmul(x, form, spec)

            return jax.vjp(product, x, w)[1](g)

        for name in ("compute", "float32"):
            dx, dw = jax.jit(backward, static_argnums=3)(x, w, g, Gathering.of(Model(gradient_dtype=name)))
            assert dw.dtype == jnp.float32 and dw.sharding.spec == w.sharding.spec and dx.dtype == jnp.bfloat16
            np.testing.assert_allclose(np.asarray(dx, np.float64), exact_dx, rtol=5e-3, atol=1e-3)
            errors[name] = np.max(np.abs(dw - exact)) / np.max(np.abs(exact))
    assert errors["float32"] < 1e-6 and 5e-4 < errors["compute"] < 4e-3


def test_nearer_to_a_run_in_float32():
    """On one device. Every matrix of the blocks; all else, and the loss, keeps its bits."""
    results = []
    for overrides in (("model.K=4",), LOW, WIDE):
        run, arguments, _ = prepared(*overrides, "model.weight=ternary", "model.L=1", "model.attention_blocks=1")
        results.append(jax.device_get(run(*arguments)))
    (_, exact), (loss, low), (same_loss, wide) = results
    assert loss == same_loss

    def compare(path, exact, low, wide):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith(".w"):
            assert np.linalg.norm(wide - exact) < 0.99 * np.linalg.norm(low - exact), name
        else:
            assert np.array_equal(low, wide), name

    jax.tree_util.tree_map_with_path(compare, exact, low, wide)
