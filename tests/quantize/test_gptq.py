"""GPTQ against a float64 derivation of its algorithm, in the layout of the paper (out, in)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.errors import UserError
from spectra_jax.quantize.gptq import gptq
from spectra_jax.quantize.hessian import damped_factor, factor, products
from spectra_jax.quantize.rtn import rtn
from spectra_jax.schema import Quantize

# Every combination of the rest, with each of the widths in turn.
CASES = [
    (bits, *rest)
    for bits, rest in zip(
        itertools.cycle((3, 4, 2, 8, 3)), itertools.product((0, 32, 64), (True, False), (False, True), (False, True))
    )
]


def levels_of(rows: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of each row, zero counted from the lowest code."""
    low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    if symmetric:
        top = np.maximum(-low, high)
        low, high = np.where(low < 0, -top, low), top
    nothing = (low == 0) & (high == 0)
    low, high = np.where(nothing, -1.0, low), np.where(nothing, 1.0, high)
    scale = (high - low) / (2**bits - 1)
    return scale, np.full(len(rows), 2.0 ** (bits - 1)) if symmetric else np.round(-low / scale)


def derived(
    w: np.ndarray, h: np.ndarray, bits: int, group: int, symmetric: bool, act_order: bool, static: bool, block: int,
    damp: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and quantized weights (out, in), column after column."""
    w, h = w.astype(np.float64), h.astype(np.float64)
    inputs = w.shape[1]
    whole = levels_of(w, bits, symmetric)
    dead = np.diag(h) == 0
    h[dead, dead], w[:, dead] = 1.0, 0.0
    fixed = [levels_of(w[:, k : k + group], bits, symmetric) for k in range(0, inputs, group)] if group else []
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(inputs)
    w, h = w[:, order], h[np.ix_(order, order)]
    h += damp * np.mean(np.diag(h)) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, values = np.zeros_like(w), np.zeros_like(w)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        inside, errors = w[:, start:stop].copy(), np.zeros((len(w), stop - start))
        for k in range(start, stop):
            if not group:
                scale, zero = whole
            elif static:
                scale, zero = fixed[order[k] // group]
            elif k % group == 0:
                scale, zero = levels_of(w[:, k : k + group], bits, symmetric)
            column = inside[:, k - start]
            codes[:, k] = np.clip(np.round(column / scale) + zero, 0, 2**bits - 1)
            values[:, k] = scale * (codes[:, k] - zero)
            errors[:, k - start] = (column - values[:, k]) / upper[k, k]
            inside[:, k - start :] -= np.outer(errors[:, k - start], upper[k, k:stop])
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    back = np.argsort(order)
    return codes[:, back], values[:, back]


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray]:
    """Weights (out, in) with a ragged last block, and a Hessian with a dead input."""
    rng = np.random.default_rng(0)
    inputs, outputs = 192, 48
    x = rng.standard_normal((1000, inputs)) @ rng.standard_normal((inputs, inputs)) * 0.1
    x += rng.standard_normal((1000, inputs))
    x[:, 5] = 0.0
    return rng.standard_normal((outputs, inputs)).astype(np.float32), (2 * x.T @ x / 10).astype(np.float32)


@pytest.mark.slow
def test_codes_are_those_of_the_derivation(layer):
    """All but ties: at most 0.05 % of the codes over all settings together, and nearly the same output error."""
    w, h = layer
    different = total = 0
    for bits, group, symmetric, act_order, static in CASES:
        q = Quantize(
            method="gptq", bits=bits, group=group, grid="gptq" if symmetric else "gptq_asymmetric", block=64,
            act_order=act_order, static_groups=static, scale_dtype="float32",
        )
        found = gptq(jnp.asarray(w.T), jnp.asarray(h), q)
        codes, values = derived(w, h, bits, group, symmetric, act_order, static, block=64)
        ours = np.asarray(found.codes, np.float64).T + (2 ** (bits - 1) if symmetric else 0)
        wrong = ours != codes
        different, total = different + wrong.sum(), total + wrong.size
        # A flipped tie moves those after it in its row only; elsewhere the values are the same.
        rows = ~wrong.any(1)
        np.testing.assert_allclose(np.asarray(found.dequantize()).T[rows], values[rows], atol=2e-5)
        error, least = ((o - w) @ h * (o - w) for o in (np.asarray(found.dequantize(), np.float64).T, values))
        assert error.sum() == pytest.approx(least.sum(), rel=2e-3), (bits, group, symmetric, act_order, static)
    assert different / total <= 5e-4, f"{different} of {total}"


def test_in_float64_every_code_agrees(layer):
    w, h = layer
    with jax.enable_x64(True):
        for bits, group, symmetric, act_order, static in CASES[::7]:
            q = Quantize(
                bits=bits, group=group, grid="gptq" if symmetric else "gptq_asymmetric", block=64,
                act_order=act_order, static_groups=static, scale_dtype="float32",
            )
            found = gptq(jnp.asarray(w.T, jnp.float64), jnp.asarray(h, jnp.float64), q)
            # The derivation's scales are not rounded to float32, so that a tie may still fall the other way.
            codes, _ = derived(w, h, bits, group, symmetric, act_order, static, block=64)
            ours = np.asarray(found.codes, np.float64).T + (2 ** (bits - 1) if symmetric else 0)
            assert np.mean(ours != codes) <= 5e-4


@pytest.mark.parametrize("grid", ["gptq", "gptq_asymmetric", "absmax"])
@pytest.mark.parametrize("group", [0, 32])
def test_without_correlations_it_rounds_to_nearest(layer, grid, group):
    w = jnp.asarray(layer[0].T)
    q = Quantize(bits=3, group=group, grid=grid, block=32, scale_dtype="float32")
    solved, rounded = gptq(w, 3.0 * jnp.eye(w.shape[0]), q), rtn(w, None, q)
    for ours, theirs in zip(jax.tree.leaves(solved), jax.tree.leaves(rounded), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_it_beats_rounding_to_nearest(layer):
    w, h = layer

    def error(other) -> float:
        d = np.asarray(other.dequantize(), np.float64).T - w
        return float(np.sum(d @ h * d))

    q = Quantize(bits=3, group=64, block=64)
    assert error(gptq(jnp.asarray(w.T), jnp.asarray(h), q)) < 0.8 * error(rtn(jnp.asarray(w.T), None, q))


def test_outputs_spread_over_devices_give_the_same_codes(layer):
    w, h = jnp.asarray(layer[0].T), jnp.asarray(layer[1])
    q = Quantize(bits=3, group=64, block=64, act_order=True)
    alone = gptq(w, h, q)
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        spread = jax.device_put(w, jax.NamedSharding(mesh, jax.P(None, "data")))
        apart = gptq(spread, jax.device_put(h, jax.NamedSharding(mesh, jax.P())), q)
        assert apart.codes.sharding.spec == jax.P(None, "data")
    assert np.mean(np.asarray(apart.codes) != np.asarray(alone.codes)) <= 5e-4
    np.testing.assert_array_equal(apart.groups, alone.groups)


def test_factor_and_products():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 50, 12))
    h = np.asarray(products(jnp.asarray(x, jnp.float32)))
    flat = x.reshape(-1, 12)
    np.testing.assert_allclose(h, flat.T @ flat, rtol=1e-5, atol=1e-4)
    u = np.asarray(factor(jnp.asarray(h), 0.1), np.float64)
    damped = flat.T @ flat + 0.1 * np.mean(np.diag(flat.T @ flat)) * np.eye(12)
    np.testing.assert_allclose(u.T @ u, np.linalg.inv(damped), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(np.tril(u, -1), 0)


def test_what_is_not_positive_definite(capsys):
    h = -0.5 * np.eye(8, dtype=np.float32)
    h += 1.0  # one positive eigenvalue, seven negative ones
    _, damp = damped_factor(jnp.asarray(h + np.eye(8, dtype=np.float32) * 0.3), 0.01, "q")
    assert damp == pytest.approx(1.0)
    with pytest.raises(UserError, match="q: the Hessian .* not positive definite with a damping of 0.01 to 1 of"):
        damped_factor(jnp.full((8, 8), jnp.nan), 0.01, "q")
    q = Quantize(bits=4, group=0, block=8)
    gptq(jnp.ones((8, 8)), jnp.asarray(h + np.eye(8, dtype=np.float32) * 0.3), q, "layer 3, mlp.up")
    assert "layer 3, mlp.up: the damping was raised from 0.01 to 1" in capsys.readouterr().err


def test_groups_that_do_not_divide():
    w, h = jnp.ones((48, 4)), jnp.eye(48)
    with pytest.raises(UserError, match="group=20 does not divide the 48 inputs of o; use 16, or 0"):
        gptq(w, h, Quantize(group=20), "o")
    with pytest.raises(UserError, match="group=24 and block=16: one must divide the other"):
        gptq(w, h, Quantize(group=24, block=16), "o")
