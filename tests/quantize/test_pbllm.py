"""PB-LLM against its algorithm in float64 numpy; and every method with a map, from a trained run to a loaded one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, V, logits, trained

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply
from spectra_jax.quantize import pipeline
from spectra_jax.quantize.pbllm import pbllm
from spectra_jax.schema import Quantize
from spectra_jax.serve.load import load
from spectra_jax.weights.form import describe, size_in_bits

BLOCK, DEAD = 32, 5


def problem(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (in, out) and the Hessian of correlated inputs, one of which is always 0."""
    rng = np.random.default_rng(seed)
    x = 0.1 * rng.standard_normal((4 * m, m)) @ rng.standard_normal((m, m)) + rng.standard_normal((4 * m, m))
    x[:, DEAD] = 0
    return np.float32(rng.standard_normal((m, n))), np.float32(2 * x.T @ x / 10)


def oracle(w: np.ndarray, h: np.ndarray, group: int, share: float, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The matrix and the map of salient weights (in, out), as specified, on W (out, in)."""
    W, H = np.float64(w.T), np.float64(h)
    columns = W.shape[1]
    bottom, top = np.minimum(W.min(1), 0), np.maximum(W.max(1), 0)
    scale = (top - bottom) / 255
    zero = np.round(-bottom / scale)
    dead = np.diag(H) == 0
    H[dead, dead], W[:, dead] = 1, 0
    H += 0.01 * np.diag(H).mean() * np.eye(columns)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    low, means, spreads = np.zeros(W.shape, bool), [], []
    for a in range(0, columns, group):
        part = W[:, a : a + group]
        score = part**2 / np.diag(U)[a : a + group] ** 2 if metric == "hessian" else np.abs(part)
        low[:, a : a + group] = score <= np.sort(score, axis=None)[int(share * score.size)]
        signs = part * low[:, a : a + group]
        means.append(signs.mean(1))
        spreads.append(np.abs(signs - signs.mean(1, keepdims=True)).mean(1))
    for j in range(columns):  # with no blocks at all: only the order of sums is another
        mean, spread = means[j // group], spreads[j // group]
        eight = scale * (np.clip(np.round(W[:, j] / scale) + zero, 0, 255) - zero)
        fixed = np.where(low[:, j], np.sign(W[:, j] - mean) * spread + mean, eight)
        W[:, j + 1 :] -= np.outer((W[:, j] - fixed) / U[j, j], U[j, j + 1 :])
        W[:, j] = fixed
    return W.T, ~low.T


@pytest.mark.parametrize("m, group, metric", [
    (192, 64, "hessian"), (176, 64, "magnitude"), (176, 128, "hessian"), (176, 0, "hessian"),
])
def test_it_is_the_specified_algorithm(m, group, metric):
    w, h = problem(m, 40)
    q = Quantize(bits=8, group=group, block=BLOCK, scale_dtype="float32", saliency=metric)
    found = pbllm(jnp.asarray(w), jnp.asarray(h), q)
    wanted, salient = oracle(w, h, group or m, 0.9, metric)
    wrong = np.abs(np.asarray(found.dequantize()) - wanted) / np.abs(wanted).max()
    print(f"pb-llm {m} {group} {metric}: masks differ in {(found.mask != salient).sum()}, "
          f"{(wrong > 1e-4).sum()} weights differ, the others by {wrong[wrong < 1e-4].max():.1e}")
    np.testing.assert_array_equal(found.mask, salient)
    assert (wrong > 1e-4).mean() < 5e-4  # ties of rounding


def test_bits():
    w, h = problem(256, 64)
    found = pbllm(jnp.asarray(w), jnp.asarray(h), Quantize(bits=8, group=128))
    high, numbers = int(np.asarray(found.mask).sum()), 2 * 2 * 64
    assert high == 2 * (128 * 64 - int(128 * 64 * 0.9) - 1)
    assert found.paper_bits() / found.weights == pytest.approx(1.7, abs=0.01)
    assert found.stored_bits() == 2 * 256 * 64 + 7 * high + 64 * (16 + 8) + 16 * numbers


@pytest.mark.parametrize("how, says", [
    ({"salient": 0.0}, "salient=0.0 .*above 0 and below 1"),
    ({"salient": 1.5}, "salient=1.5 .*above 0 and below 1"),
    ({"saliency": "hessain"}, "'hessain' is not one of hessian, magnitude; did you mean hessian"),
])
def test_refusals(how, says):
    w, h = problem(64, 8)
    with pytest.raises(UserError, match=says):
        pbllm(jnp.asarray(w), jnp.asarray(h), Quantize(bits=8, **how))


@pytest.mark.parametrize("preset, form, bits", [
    ("pb-llm", "Masked", (1.6, 1.75)),
    pytest.param("sparsegpt-50", "Masked", (8.8, 9.1), marks=pytest.mark.slow),
    pytest.param("sparsegpt-2of4", "Masked", (9, 9), marks=pytest.mark.slow),
    pytest.param("billm", "Tables", (1, 1.99), marks=pytest.mark.slow),
])
def test_from_a_trained_run_to_a_loaded_one(preset, form, bits, tmp_path, monkeypatch):
    sizes = [f"quantize.{text}" for text in ("block=16", "group=16", "samples=16", "batch=8")]
    config = configs.load(f"{ROOT}/configs/quantlm.py:{preset}", sizes)
    written = []
    write = pipeline.write_made
    monkeypatch.setattr(pipeline, "write_made", lambda *a, **k: (written.append(a[2]), write(*a, **k)))
    out = pipeline.quantize(str(trained()), config, tmp_path / "quantized")

    (parameters,), loaded = written, load(str(out))
    found = describe(loaded.parameters)
    assert found == describe(parameters) and {entry["form"] for entry in found.values()} == {form}
    blocks = {name: loaded.parameters["blocks"][name] for name in ("attention", "mlp")}
    weights = sum(w.weights for part in blocks.values() for node in part.values() for w in [node["w"]])
    paper = size_in_bits(blocks)[1] / weights
    assert bits[0] <= paper <= bits[1]
    assert loaded.record["quantized"]["stored_bits"] == size_in_bits(loaded.parameters)[0]

    tokens = np.random.default_rng(0).integers(0, V - 4, (8, 16)).astype(np.int32)
    with jax.set_mesh(loaded.mesh):
        memory = np.asarray(apply(loaded.graphdef, parameters)(jnp.asarray(tokens)))
    float_logits, new = logits(trained(), tokens), logits(out, tokens)
    np.testing.assert_allclose(new, memory, rtol=1e-4, atol=1e-5)
    apart = np.linalg.norm(new - float_logits) / np.linalg.norm(float_logits)
    print(f"{preset}: {paper:.3f} bits a weight in its paper's count; logits move by {apart:.1%}")
    assert 1e-3 < apart < 0.6
