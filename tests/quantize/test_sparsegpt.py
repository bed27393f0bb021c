"""SparseGPT against its algorithm in float64 numpy, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.errors import UserError
from spectra_jax.quantize.sparsegpt import sparsegpt, sparsegpt_quantized
from spectra_jax.schema import Quantize
from spectra_jax.sharding import AXES

DEAD = 5


def problem(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (in, out) and the Hessian of correlated inputs, one of which is always 0."""
    rng = np.random.default_rng(seed)
    x = 0.1 * rng.standard_normal((4 * m, m)) @ rng.standard_normal((m, m)) + rng.standard_normal((4 * m, m))
    x[:, DEAD] = 0
    return np.float32(rng.standard_normal((m, n))), np.float32(2 * x.T @ x / 10)


def oracle(w: np.ndarray, h: np.ndarray, block: int, sparsity=0.5, pattern=None, bits=0) -> np.ndarray:
    """Column by column as published, on W (out, in) in float64; returns the matrix (in, out)."""
    W, H = np.float64(w.T), np.float64(h)
    rows, columns = W.shape
    if bits:
        low, high, steps = np.minimum(W.min(1), 0), np.maximum(W.max(1), 0), 2**bits - 1
        scale = (high - low) / steps
        zero = np.round(-low / scale)
    dead = np.diag(H) == 0
    H[dead, dead], W[:, dead] = 1, 0
    H += 0.01 * np.diag(H).mean() * np.eye(columns)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    for a in range(0, columns, block):
        b = min(a + block, columns)
        errors = np.zeros((rows, b - a))
        if pattern is None:
            scores = W[:, a:b] ** 2 / np.diag(U)[a:b] ** 2
            drop = scores <= np.sort(scores, axis=None)[int(scores.size * sparsity)]
        else:
            drop = np.zeros((rows, b - a), bool)
        for j in range(a, b):
            if pattern is not None and j % pattern[1] == 0:
                scores = W[:, j : j + pattern[1]] ** 2 / np.diag(U)[j : j + pattern[1]] ** 2
                for row, lowest in enumerate(np.argsort(scores, axis=1, kind="stable")[:, : pattern[0]]):
                    drop[row, j - a + lowest] = True
            kept = W[:, j]
            if bits:
                kept = scale * (np.clip(np.round(kept / scale) + zero, 0, steps) - zero)
            fixed = np.where(drop[:, j - a], 0, kept)
            errors[:, j - a] = (W[:, j] - fixed) / U[j, j]
            W[:, j + 1 : b] -= np.outer(errors[:, j - a], U[j, j + 1 : b])
            W[:, j] = fixed
        W[:, b:] -= errors @ U[a:b, b:]
    return W.T


def settings(**values) -> Quantize:
    return Quantize(**{"scale_dtype": "float32", "block": 64, **values})


@pytest.mark.parametrize("m, block, how", [  # whole blocks, half a block at the end, more blocks than are one loop
    (192, 64, {"sparsity": 0.5}), (160, 64, {"sparsity": 0.7}), (176, 32, {"sparsity": 0.5}),
    (160, 64, {"pattern": "2:4"}), (176, 32, {"pattern": "3:8"}),
])
def test_it_is_the_published_algorithm(m, block, how):
    w, h = problem(m, 48)
    found = sparsegpt(jnp.asarray(w), jnp.asarray(h), settings(block=block, **how))
    pattern = tuple(map(int, how["pattern"].split(":"))) if "pattern" in how else None
    wanted = oracle(w, h, block, how.get("sparsity", 0.5), pattern)
    matrix = np.asarray(found.dequantize())
    worst = np.abs(matrix - wanted).max() / np.abs(wanted).max()
    print(f"sparsegpt {m} {block} {how}: masks differ in {(found.mask != (wanted != 0)).sum()}, values by {worst:.1e}")
    np.testing.assert_array_equal(found.mask, wanted != 0)
    assert worst < 1e-4
    np.testing.assert_array_equal(matrix[DEAD], 0)


def test_a_share_goes_of_each_block_and_n_of_every_m():
    w, h = problem(192, 48)
    mask = np.asarray(sparsegpt(jnp.asarray(w), jnp.asarray(h), settings(sparsity=0.5)).mask)
    # Everything up to and including the weight at that place: one more than half.
    assert [int((~block).sum()) for block in mask.reshape(3, -1)] == [64 * 24 + 1] * 3
    mask = np.asarray(sparsegpt(jnp.asarray(w), jnp.asarray(h), settings(pattern="2:4")).mask)
    kept = mask.reshape(48, 4, 48).sum(1)
    alive = np.delete(kept, DEAD // 4, axis=0)
    assert (alive == 2).all() and kept[DEAD // 4].max() == 2


@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_kept_weights_on_a_grid(how):
    w, h = problem(160, 48)
    q = settings(bits=4, **how)
    found = sparsegpt_quantized(jnp.asarray(w), jnp.asarray(h), q)
    wanted = oracle(w, h, 64, 0.5, (2, 4) if "pattern" in how else None, bits=4)
    differ = (np.abs(found.dequantize() - wanted) > 1e-4 * np.abs(wanted).max()).mean()
    print(f"sparsegpt 4 bit {how}: {differ:.2%} of the weights differ")
    assert differ < 5e-4  # ties of rounding
    kept = int(np.asarray(found.mask).sum())
    assert found.stored_bits() == 160 * 48 + 4 * kept + 48 * (32 + 4)


def test_what_is_stored_in_float16_is_what_was_meant():
    w, h = problem(160, 48)
    both = [settings(scale_dtype=dtype) for dtype in ("float32", "float16")]
    exact, rounded = (sparsegpt(jnp.asarray(w), jnp.asarray(h), q) for q in both)
    assert rounded.kept.dtype == jnp.float16
    kept = int(np.asarray(rounded.mask).sum())
    assert rounded.stored_bits() == 160 * 48 + 16 * kept
    loss = lambda form: np.sum((d := np.float64(form.dequantize()) - w) * (np.float64(h) @ d))  # noqa: E731
    assert loss(rounded) == pytest.approx(loss(exact), rel=1e-3)
    # It makes up for its error: cutting the same number of weights without that costs more.
    magnitude = np.where(np.abs(w) <= np.median(np.abs(w)), 0, w)
    assert loss(exact) < 0.8 * np.sum((magnitude - w) * (np.float64(h) @ (magnitude - w)))


def test_spread_over_devices_it_is_the_same():
    w, h, how = *problem(64, 48), {"pattern": "2:4"}
    alone = sparsegpt(jnp.asarray(w), jnp.asarray(h), settings(**how))
    with jax.set_mesh(jax.make_mesh((1, 8, 1), AXES)):
        spread = jax.device_put(w, jax.P(None, AXES))
        found = sparsegpt(spread, jax.device_put(h, jax.P()), settings(**how))
        assert np.isfinite(np.asarray(spread - found.dequantize())).all()
    np.testing.assert_array_equal(found.mask, alone.mask)
    np.testing.assert_allclose(found.kept, alone.kept, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how, says", [
    ({"sparsity": 0.0}, "sparsity=0.0 .*above 0 and below 1"),
    ({"sparsity": 1.0}, "sparsity=1.0 .*above 0 and below 1"),
    ({"pattern": "2/4"}, "'2/4' is not N:M"),
    ({"pattern": "4:4"}, "'4:4' is not N:M"),
    ({"pattern": "0:4"}, "'0:4' is not N:M"),
    ({"pattern": "2:7"}, "7 does not divide the 160 inputs of layer 0.*M may be 2, 4, 5, 8, 10 with .*block=40"),
    ({"pattern": "8:16"}, "16 does not divide the 40 inputs that are worked through at once"),
])
def test_refusals(how, says):
    w, h = problem(160, 8)
    with pytest.raises(UserError, match=says):
        sparsegpt(jnp.asarray(w), jnp.asarray(h), settings(block=40, **how), "layer 0")
