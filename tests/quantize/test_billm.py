"""BiLLM against its algorithm in float64 numpy, and its count of bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.errors import UserError
from spectra_jax.quantize.billm import billm
from spectra_jax.schema import Quantize

BLOCK, DEAD, N = 64, 5, 24


def problem(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (in, out) and the Hessian of correlated inputs of different sizes, one of which is always 0."""
    rng = np.random.default_rng(seed)
    x = 0.1 * rng.standard_normal((4 * m, m)) @ rng.standard_normal((m, m)) + rng.standard_normal((4 * m, m))
    x *= np.exp(0.5 * rng.standard_normal(m))
    x[:, DEAD] = 0
    return np.float32(rng.standard_normal((m, n)) * 0.05), np.float32(2 * x.T @ x / 10)


def residual(X: np.ndarray, mask: np.ndarray, rounds: int) -> np.ndarray:
    """R_k of one matrix (out, in), row by row; 0 off the mask."""
    out = np.zeros_like(X)
    for x, chosen, row in zip(X, mask, out):
        if chosen.any():
            values = x[chosen]
            near = np.zeros_like(values)
            for _ in range(rounds):
                left = values - near
                distance = left - left.mean()
                near += np.sign(distance) * np.abs(distance).mean() + left.mean()
            row[chosen] = near
    return out


def oracle(w: np.ndarray, h: np.ndarray, metric: str) -> tuple[np.ndarray, int]:
    """The matrix (in, out) and the number of salient inputs, as specified, on W (out, in)."""
    W, H = np.float64(w.T), np.float64(h)
    columns = W.shape[1]
    dead = np.diag(H) == 0
    H[dead, dead], W[:, dead] = 1, 0
    H += 0.01 * np.diag(H).mean() * np.eye(columns)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    salient_inputs = 0
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        V, d = W[:, a:b].copy(), np.diag(U)[a:b]
        T = V**2 / d**2 if metric == "hessian" else V
        order = np.argsort(-np.abs(T).sum(0), kind="stable")
        best = np.inf
        for i in range(1, min(50, b - a + 1)):
            first = np.zeros(V.shape, bool)
            first[:, order[:i]] = True
            error = np.mean((T - residual(T, first, 2) - residual(T, ~first, 2)) ** 2)
            if error < best:
                best, salient, count = error, first, i
        salient_inputs += count
        fixed_part, best = residual(T, salient, 2), np.inf
        for p in np.quantile(np.abs(T * ~salient), np.linspace(0.1, 0.9, 81)):
            low, high = (np.abs(T) < p) & ~salient, (np.abs(T) >= p) & ~salient
            error = np.mean((T - residual(T, low, 1) - residual(T, high, 1) - fixed_part) ** 2)
            if error < best:
                best, sets = error, (low, high)
        Q = residual(V, sets[0], 1) + residual(V, sets[1], 1) + residual(V, salient, 2)
        W[:, b:] -= ((V - Q) / d) @ U[a:b, b:]
        W[:, a:b] = Q
    return W.T, salient_inputs


@pytest.mark.parametrize("m, metric, double", [
    (128, "hessian", False), (96, "hessian", True), (96, "magnitude", False), (48, "hessian", False),
])
def test_it_is_the_specified_algorithm(m, metric, double):
    w, h = problem(m, N)
    wanted, salient = oracle(w, h, metric)
    q = Quantize(block=BLOCK, scale_dtype="float32", saliency=metric)
    with jax.enable_x64(double):
        w, h = (jnp.asarray(x, jnp.float64 if double else jnp.float32) for x in (w, h))
        found = billm(w, h, q)
        matrix = np.asarray(found.dequantize())
    worst = np.abs(matrix - wanted).max() / np.abs(wanted).max()
    print(f"billm {m} {metric} double={double}: differs by {worst:.1e}; {salient} salient inputs")
    assert worst < 1e-4
    codes = np.asarray(found.codes)
    assert ((codes >= 4) == (codes[:, :1] >= 4)).all()
    assert (codes[:, 0] >= 4).sum() == salient
    assert found.paper_bits() == N * (m + salient)


def test_three_bits_a_weight():
    w, h = problem(160, N)
    found = billm(jnp.asarray(w), jnp.asarray(h), Quantize(block=BLOCK))
    assert found.tables.shape == (8, 3, N) and found.tables.dtype == jnp.float16
    assert found.stored_bits() == 2 * 160 * N + 160 + 8 * 3 * N * 16
    assert 1 < found.paper_bits() / found.weights < 1.5
    # Rounding the tables moves the later blocks a little: other borders, and as good a matrix.
    loss = lambda matrix: np.sum((d := np.float64(matrix) - w) * (np.float64(h) @ d))  # noqa: E731
    assert loss(found.dequantize()) == pytest.approx(loss(oracle(w, h, "hessian")[0]), rel=0.03)
    assert loss(found.dequantize()) < 0.5 * loss(np.sign(w) * np.abs(w).mean(0))


def test_refusals():
    w, h = problem(64, 8)
    with pytest.raises(UserError, match="config.quantize.saliency='hessain' is not one of .*did you mean hessian"):
        billm(jnp.asarray(w), jnp.asarray(h), Quantize(saliency="hessain"))
    with pytest.raises(UserError, match="layer 0: the Hessian of its inputs is not positive definite"):
        billm(jnp.asarray(w), jnp.asarray(-h), Quantize(), "layer 0")
