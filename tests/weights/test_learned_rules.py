"""Rules that learn something beside a matrix, against float64 derivations: values, gradients, and what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.errors import UserError
from spectra_jax.weights import get_rule
from spectra_jax.weights.rule import Shards

M, N, G = 24, 10, 8  # inputs, outputs, inputs of a group
ONE = Shards()


def drawn(seed: int, *shape: int) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def parts(rule, latent):
    statistics = rule.statistics([latent], ONE)
    return rule.effective(latent, statistics, ONE), rule.freeze(latent, statistics, ONE)


def gradients(rule, latent, g):
    """Of the sum of g times the effective matrix, to the floats of the latent."""
    floats = {name: value for name, value in vars(latent).items() if value is not None and value.dtype == jnp.float32}

    def total(floats):
        whole = type(latent)(**{**vars(latent), **floats})
        return jnp.sum(g * rule.effective(whole, rule.statistics([whole], ONE), ONE))

    return jax.grad(total)(floats)


def ternary(w: np.ndarray, threshold: float):
    """Codes and magnitudes beyond the threshold, group by group and output by output."""
    codes, scale = np.zeros(w.shape), np.zeros((M // G, N))
    for i in range(M // G):
        for j in range(N):
            run = w[i * G : (i + 1) * G, j].astype(np.float64)
            kept = np.abs(run) > threshold * np.mean(np.abs(run))
            codes[i * G : (i + 1) * G, j] = np.where(kept, np.sign(run), 0)
            scale[i, j] = np.abs(run)[kept].mean()
    return codes, scale


def test_dlt_begins_with_the_best_scale():
    w, rule = drawn(0, M, N), get_rule(f"dlt:group={G},scale_dtype=float32")
    latent = rule.latent(jnp.asarray(w), ONE)
    codes, scale = ternary(w, 0.7)
    effective, frozen = parts(rule, latent)
    np.testing.assert_array_equal(frozen.codes, codes)
    np.testing.assert_allclose(latent.scale, scale, rtol=2e-7)
    np.testing.assert_allclose(effective, codes * np.repeat(scale, G, 0), rtol=3e-7)
    assert not latent.shift.any()

    def error(factor):
        return np.sum((w - codes * np.repeat(scale * factor, G, 0)) ** 2)

    assert error(1.0) < min(error(0.99), error(1.01))


def test_dlt_computes_and_learns_by_the_equations():
    w, g, rule = drawn(1, M, N), drawn(2, M, N), get_rule(f"dlt:group={G},scale_dtype=float32,threshold=0.75")
    latent = type(rule.latent(jnp.asarray(w), ONE))(
        jnp.asarray(w), jnp.asarray(0.03 + drawn(3, M // G, N)), jnp.asarray(drawn(4, M // G, N))
    )
    codes, _ = ternary(w, 0.75)
    alpha, gamma, g64 = (np.asarray(x, np.float64) for x in (latent.scale, latent.shift, g))
    wide = np.repeat(alpha, G, 0)
    effective, frozen = parts(rule, latent)
    np.testing.assert_allclose(effective, wide * codes + np.repeat(gamma, G, 0), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(effective, frozen.dequantize())
    found = gradients(rule, latent, g)
    by_group = lambda x: x.reshape(M // G, G, N).sum(1)  # noqa: E731
    np.testing.assert_allclose(found["scale"], by_group(g64 * codes), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found["shift"], by_group(g64), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found["w"], np.where(codes == 0, 1, wide) * g64, rtol=1e-6)
    straight = get_rule(f"dlt:group={G},scaled_gradient=False")
    np.testing.assert_array_equal(gradients(straight, latent, g)["w"], g)


def test_dlt_without_a_shift_begins_as_trilm():
    """One scale for a matrix of one output: TriLM's is the mean magnitude plus 1e-5."""
    w, plain = jnp.asarray(drawn(5, 64, 1)), get_rule("ternary")
    rule = get_rule("dlt:group=0,threshold=0.5,init=absmean,scale_dtype=float32")
    effective, frozen = parts(rule, rule.latent(w, ONE))
    statistics = plain.statistics([w], ONE)
    assert statistics.scale[0] == pytest.approx(float(frozen.scales[0, 0]) + 1e-5, rel=1e-6)
    np.testing.assert_array_equal(frozen.codes, plain.codes(w, statistics, ONE))
    np.testing.assert_allclose(effective, plain.effective(w, statistics, ONE), atol=1.001e-5)


def test_dlt_counts_its_bits():
    rule = get_rule(f"dlt:group={G}")
    _, frozen = parts(rule, rule.latent(jnp.asarray(drawn(6, M, N)), ONE))
    assert frozen.scales.dtype == jnp.float16
    assert frozen.stored_bits() == 2 * M * N + 2 * 16 * (M // G) * N
    assert frozen.paper_bits() == pytest.approx(1.58 * M * N + 32 * (M // G) * N)


def searched(w: np.ndarray, bits: int) -> np.ndarray:
    """LR-QAT's range search, in float64."""
    top, best = 2 ** (bits - 1) - 1, np.zeros((M // G, N))
    for i in range(M // G):
        for j in range(N):
            run, least = w[i * G : (i + 1) * G, j].astype(np.float64), np.inf
            for k in range(1, 101):
                s = k / 100 * np.abs(run).max() / top
                error = np.sum((run - s * np.clip(np.rint(run / s), -top - 1, top)) ** 4)
                if error < least:
                    best[i, j], least = s, error
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lrqat_begins_with_the_searched_ranges(bits):
    w, rule = drawn(7, M, N), get_rule(f"lrqat:bits={bits},group={G},rank=4,scale_dtype=float32")
    latent = rule.latent(jnp.asarray(w), ONE)
    scale = searched(w, bits)
    np.testing.assert_allclose(latent.scale, scale, rtol=1e-6)
    wide = np.repeat(scale, G, 0)
    step, top = 2.0 ** (8 - bits), 2 ** (bits - 1)
    expected = np.clip(np.rint(np.clip(w / wide, -top, top - 1) * step), -128, 127)
    assert np.abs(latent.master - expected).max() <= 1 and np.mean(latent.master != expected) < 0.01
    assert latent.master.dtype == jnp.int8 and not latent.a.any()
    assert np.abs(latent.b).max() <= M**-0.5 and np.std(latent.b) == pytest.approx(M**-0.5 / 3**0.5, rel=0.15)
    effective, frozen = parts(rule, latent)
    np.testing.assert_array_equal(effective, frozen.dequantize())
    nearest = wide * np.clip(np.rint(np.asarray(latent.master, np.float64) / step), -top, top - 1)
    np.testing.assert_allclose(effective, nearest, rtol=1e-6)


@pytest.mark.parametrize("rank", [0, 3])
def test_lrqat_learns_by_the_equations(rank):
    bits, g, rule = 3, drawn(8, M, N), get_rule(f"lrqat:bits=3,group={G},rank={rank},alpha=2.0,scale_dtype=float32")
    latent = rule.latent(jnp.asarray(drawn(9, M, N)), ONE)
    if rank:
        latent = type(latent)(latent.master, latent.scale, jnp.asarray(600 * drawn(10, rank, N)), latent.b)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    master, scale = np.asarray(latent.master, np.float64), np.repeat(np.asarray(latent.scale, np.float64), G, 0)
    place = master
    if rank:
        a, b = np.asarray(latent.a, np.float64), np.asarray(latent.b, np.float64)
        place = master / 2 ** (8 - bits) + 2.0 / rank * b @ a
    rounded = np.rint(place)
    inside, clipped = (rounded >= low) & (rounded <= high), np.clip(rounded, low, high)
    assert 0.02 < np.mean(~inside) < 0.5 or not rank
    effective, frozen = parts(rule, latent)
    np.testing.assert_array_equal(frozen.codes, clipped)
    np.testing.assert_allclose(effective, scale * clipped, rtol=1e-6)
    found, d = gradients(rule, latent, g), np.asarray(g, np.float64) * scale * inside
    np.testing.assert_allclose(found["scale"], (g * clipped).reshape(M // G, G, N).sum(1), rtol=1e-5, atol=1e-7)
    if rank:
        np.testing.assert_allclose(found["a"], 2.0 / rank * b.T @ d, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(found["b"], 2.0 / rank * d @ a.T, rtol=1e-4, atol=1e-9)
        assert set(found) == {"scale", "a", "b"}
    else:
        np.testing.assert_allclose(found["master"], d, rtol=1e-6)
    assert frozen.stored_bits() == bits * M * N + 32 * (M // G) * N


def test_sparse_stores_a_map():
    w, rule = drawn(11, M, N), get_rule("sparse")
    w[np.abs(w) < 0.012] = 0
    effective, frozen = parts(rule, jnp.asarray(w))
    kept = np.count_nonzero(w)
    assert 0 < kept < 0.8 * M * N
    np.testing.assert_array_equal(effective, frozen.dequantize())
    np.testing.assert_allclose(effective, w, rtol=2**-8)
    assert frozen.stored_bits() == M * N + 16 * kept


@pytest.mark.parametrize(
    ("name", "message"),
    [("dlt:group=5", "group=5 does not divide the 24 inputs of a matrix; use 4"),
     ("dlt:init=two", "init='two' is not one of twn, absmean"), ("lrqat:bits=8", "from 2 to 7 bits"),
     ("lrqat:rank=-1", "rank=-1")],
)
def test_refusals(name, message):
    rule = get_rule(name)
    with pytest.raises(UserError, match=message):
        rule.latent(jnp.asarray(drawn(0, M, N)), ONE)
