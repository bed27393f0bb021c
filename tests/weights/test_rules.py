"""Every weight rule against float64 arithmetic: what it stores, what it computes, what flows back.

The references below follow the papers' formulas one shard at a time, in numpy, and share no code
with the package.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.errors import UserError
from spectra_jax.weights import RULES, get_rule
from spectra_jax.weights.binary import Binary
from spectra_jax.weights.bitnet158 import quantize_tokens, rms_normalise
from spectra_jax.weights.frozen import Frozen, matmul
from spectra_jax.weights.rule import Shards

QUANTIZED = ["ternary", "binary", "bitnet158"]
CUTS = [(1, 1), (3, 1), (3, 0), (2, 0)]  # (count, axis)
M, N = 24, 36


def latent(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights with a mean, tails beyond the scale, and shards of different magnitude."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0.5, 2.0, shape[0])[:, None] * np.linspace(0.5, 2.0, shape[1])[None]
    return (ramp * (0.02 * rng.standard_normal(shape) + 0.004)).astype(np.float32)


def reference(
    name: str, ws: list[np.ndarray], cut: tuple[int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(codes, scales) of matrices that share their scales, in float64."""
    count, axis = cut
    pieces = [np.split(w.astype(np.float64), count, axis=axis) for w in ws]
    found = [([], []) for _ in ws]
    for shard in range(count):
        values = np.concatenate([p[shard].ravel() for p in pieces])
        mean, magnitude = values.mean(), np.abs(values).mean()
        scale = {
            "ternary": 1e-5 + magnitude,
            "binary": magnitude,
            "bitnet158": max(magnitude, 1e-5),
        }[name]
        for (codes, scales), p in zip(found, pieces):
            scaled = p[shard] / scale
            if name == "binary":
                assert np.min(np.abs(p[shard] - mean)) > 1e-7 * scale, (
                    "too near to a tie for float32"
                )
                codes.append(np.sign(p[shard] - mean))
            else:
                assert np.min(np.abs(np.abs(scaled) - 0.5)) > 1e-6, "too near to a tie for float32"
                codes.append(np.where(np.abs(scaled) < 0.5, 0, np.sign(scaled)))
            scales.append(scale)
    return [(np.concatenate(codes, axis=axis), np.array(scales)) for codes, scales in found]


def spread(scales: np.ndarray, shape: tuple[int, int], axis: int) -> np.ndarray:
    """One scale per element."""
    index = np.arange(shape[axis]) * len(scales) // shape[axis]
    line = scales[index]
    return np.broadcast_to(line[:, None] if axis == 0 else line[None], shape)


# --- forward ---


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_and_scales(name, cut):
    w, rule, shards = latent(M, N), get_rule(name), Shards(*cut)
    [(codes, scales)] = reference(name, [w], cut)
    statistics = rule.statistics([jnp.asarray(w)], shards)
    frozen = rule.freeze(jnp.asarray(w), statistics, shards)
    assert frozen.codes.dtype == jnp.int8 and frozen.scales.dtype == jnp.float32
    assert frozen.scales.shape == (cut[0],) and frozen.axis == cut[1]
    np.testing.assert_array_equal(frozen.codes, codes)
    np.testing.assert_allclose(frozen.scales, scales, rtol=1e-6)
    assert set(np.unique(codes)) == ({-1, 1} if name == "binary" else {-1, 0, 1})
    effective = rule.effective(jnp.asarray(w), statistics, shards)
    assert effective.dtype == jnp.float32
    np.testing.assert_allclose(effective, codes * spread(scales, w.shape, cut[1]), rtol=1e-6)
    # one magnitude per shard, besides zero: what the released weights show
    assert len(np.unique(np.abs(effective))) <= cut[0] + 1
    np.testing.assert_array_equal(frozen.dequantize(), effective)


@pytest.mark.parametrize("name", QUANTIZED)
def test_shared_scales(name):
    """q, k and v of grouped-query attention: unequal widths, one scale per shard over all three."""
    ws, shards = [latent(M, width, seed=s) for s, width in enumerate((36, 12, 12))], Shards(2, 1)
    rule = get_rule(name)
    statistics = rule.statistics([jnp.asarray(w) for w in ws], shards)
    for w, (codes, scales) in zip(ws, reference(name, ws, (2, 1))):
        frozen = rule.freeze(jnp.asarray(w), statistics, shards)
        np.testing.assert_array_equal(frozen.codes, codes)
        np.testing.assert_allclose(frozen.scales, scales, rtol=1e-6)
    alone = rule.statistics([jnp.asarray(ws[0])], shards)
    assert not np.allclose(alone.scale, statistics.scale, rtol=1e-3)


def test_float_is_the_latent_weight():
    rule, w = get_rule("float"), jnp.asarray(latent(M, N))
    assert rule.effective(w, None, Shards()) is w and rule.freeze(w, None, Shards()) is w
    x = jnp.ones((2, M))
    assert rule.activation(x) is x


@pytest.mark.parametrize("name", ["ternary", "bitnet158"])
def test_ties_round_to_even(name):
    """Half a scale gives 0, as in torch; the next float above half gives 1."""
    rule = get_rule(name)
    w = jnp.asarray(
        [[0.5, -0.5, 1.5, -1.5, np.nextafter(np.float32(0.5), np.float32(1)), 0.49, 1.0, -1.0]]
    )
    statistics = jax.tree.map(jnp.ones_like, rule.statistics([w], Shards()))  # a scale of 1
    np.testing.assert_array_equal(rule.codes(w, statistics, Shards()), [[0, 0, 1, -1, 1, 0, 1, -1]])


def test_epsilons():
    """TriLM adds 1e-5 to the mean; BitNet bounds it by 1e-5 from below; BiLM has none."""
    tiny, w = jnp.full((4, 4), 1e-6), jnp.full((4, 4), 1e-3)
    for name, of_tiny, of_w in (
        ("ternary", 1.1e-5, 1.01e-3),
        ("bitnet158", 1e-5, 1e-3),
        ("binary", 1e-6, 1e-3),
    ):
        for values, scale in ((tiny, of_tiny), (w, of_w)):
            found = get_rule(name).statistics([values], Shards()).scale
            np.testing.assert_allclose(found, [scale], rtol=1e-6)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_zero_matrix_stays_finite(name):
    w, rule = jnp.zeros((4, 4)), get_rule(name)
    statistics = rule.statistics([w], Shards())
    effective = rule.effective(w, statistics, Shards())
    np.testing.assert_array_equal(effective, np.zeros((4, 4)))


@pytest.mark.parametrize("sign", [1, -1])
def test_sign_of_zero(sign):
    """A weight that is exactly the mean; BiLM's paper leaves its sign open, so it is a setting."""
    w, rule = jnp.asarray([[-1.0, 0.0, 1.0, 0.0]]), Binary(sign_of_zero=sign)
    codes = rule.codes(w, rule.statistics([w], Shards()), Shards())
    np.testing.assert_array_equal(codes, [[-1, sign, 1, sign]])
    assert get_rule("binary").sign_of_zero == 1


def test_binary_is_centred():
    """The sign is taken about the mean of the shard, the magnitude about zero."""
    w = jnp.asarray([[1.0, 2.0, 3.0, 10.0], [-1.0, -2.0, -3.0, -10.0]])
    rule, shards = get_rule("binary"), Shards(2, 0)
    frozen = rule.freeze(w, rule.statistics([w], shards), shards)
    np.testing.assert_array_equal(frozen.codes, [[-1, -1, -1, 1], [1, 1, 1, -1]])
    np.testing.assert_array_equal(frozen.scales, [4, 4])


def test_unknown_rule():
    with pytest.raises(
        UserError, match="model.weight='trenary' is not one of float, .*; did you mean ternary?"
    ):
        get_rule("trenary")
    assert {name: rule.paper_bits for name, rule in RULES.items()} == {
        "float": 16, "ternary": 1.58, "binary": 1, "bitnet158": 1.58, "dlt": 1.58, "lrqat": 4, "sparse": 16,
        "bitlinear": 1.58,
    }  # fmt: skip


# --- frozen = training, bit for bit ---


@pytest.mark.parametrize(
    ("cut", "dtype"), [((1, 1), jnp.float32), ((3, 1), jnp.float32), ((2, 0), jnp.bfloat16)]
)
@pytest.mark.parametrize("name", ["float", *QUANTIZED])
def test_frozen_forward_is_the_training_forward(name, cut, dtype):
    rule, shards, w = get_rule(name), Shards(*cut), jnp.asarray(latent(M, N))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, M)), dtype)
    take = jax.jit(lambda w: rule.statistics([w], shards) if rule.quantized else None)
    train = jax.jit(lambda x, w, s: matmul(rule.activation(x), rule.effective(w, s, shards)))
    serve = jax.jit(lambda x, f: matmul(rule.activation(x), f))
    frozen = jax.jit(lambda w, s: rule.freeze(w, s, shards))(w, take(w))
    assert isinstance(frozen, Frozen) == rule.quantized
    expected = train(x, w, take(w))
    assert expected.dtype == dtype
    np.testing.assert_array_equal(serve(x, frozen), expected)
    # Codes and their product round alike outside of jit; sums need not, so the scales are its own.
    eager = rule.freeze(w, take(w), shards)
    np.testing.assert_array_equal(serve(x, eager), expected)


# --- gradients ---


def normalise64(x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """RMS-normalised tokens and 1/rms."""
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * inverse, inverse


def loss_and_gradients64(name, x, effective, target):
    """mean(tanh(a(x) W)^2 * target) with a the rule's activation, and its gradients by hand.

    Straight through: the product sees W_effective and the 8-bit activations, and so does dL/dW.
    """
    x, target = x.astype(np.float64), target.astype(np.float64)
    h = x
    if name == "bitnet158":
        normal, inverse = normalise64(x, 1e-6)
        step = np.maximum(np.abs(normal).max(-1, keepdims=True), 1e-5) / 127
        assert np.abs(np.abs(normal / step % 1) - 0.5).min() > 1e-4, "too near to a tie for float32"
        h = np.clip(np.round(normal / step), -128, 127) * step
    y = h @ effective
    t = np.tanh(y)
    dy = 2 * t * (1 - t**2) * target / y.size
    dw, dh = h.T @ dy, dy @ effective.T
    if name == "bitnet158":  # through the normalisation, as if nothing had been rounded
        dh = inverse * (dh - normal * (normal * dh).mean(-1, keepdims=True))
    return (t**2 * target).mean(), dw, dh


@pytest.mark.parametrize("cut", [(1, 1), (3, 1), (2, 0)])
@pytest.mark.parametrize("name", ["float", *QUANTIZED])
def test_gradient_is_straight_through(name, cut):
    rng, rule, shards = np.random.default_rng(3), get_rule(name), Shards(*cut)
    w = latent(M, N)
    x, target = (rng.standard_normal((7, size)).astype(np.float32) for size in (M, N))
    effective = w.astype(np.float64)
    if rule.quantized:
        [(codes, scales)] = reference(name, [w], cut)
        effective = codes * spread(scales, w.shape, cut[1])
        beyond = np.abs(w) > spread(scales, w.shape, cut[1])
        assert 0.1 < beyond.mean() < 0.9  # both sides of the clip: a mask would show

    def loss(w, x):
        statistics = rule.statistics([w], shards) if rule.quantized else None
        y = matmul(rule.activation(x), rule.effective(w, statistics, shards))
        return jnp.mean(jnp.tanh(y) ** 2 * target)

    value, (dw, dx) = jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.asarray(w), jnp.asarray(x))
    expected, dw64, dx64 = loss_and_gradients64(name, x, effective, target)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(dw, dw64, rtol=1e-4, atol=1e-6 * np.abs(dw64).max())
    np.testing.assert_allclose(dx, dx64, rtol=1e-4, atol=1e-6 * np.abs(dx64).max())


def test_gradient_of_shared_scales_is_each_matrixs_own():
    """Nothing flows through the scale: q's gradient does not reach k."""
    rule, shards = get_rule("ternary"), Shards(2, 1)
    q, k = (jnp.asarray(latent(8, 4, seed=s)) for s in (0, 1))

    def loss(q, k):
        statistics = rule.statistics([q, k], shards)
        return jnp.sum(rule.effective(q, statistics, shards) ** 2)

    dq, dk = jax.grad(loss, (0, 1))(q, k)
    effective = rule.effective(q, rule.statistics([q, k], shards), shards)
    np.testing.assert_allclose(dq, 2 * effective, rtol=1e-6)
    np.testing.assert_array_equal(dk, np.zeros_like(k))


# --- BitNet's activations ---


def test_tokens_have_255_levels():
    x = np.random.default_rng(5).standard_normal((3, 50)).astype(np.float32)
    x[1] *= 1e-7  # below the bound on the largest magnitude: the step is 1e-5/127
    quantized = np.asarray(quantize_tokens(jnp.asarray(x), 1e-5), np.float64)
    step = np.maximum(np.abs(x.astype(np.float64)).max(-1, keepdims=True), 1e-5) / 127
    levels = quantized / step
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert np.abs(levels).max() <= 127 + 1e-4
    np.testing.assert_allclose(quantized, x, atol=1.001 * step.max() / 2)
    assert np.abs(levels[0]).max() == pytest.approx(127)  # the largest magnitude is kept


def test_normalisation_has_no_gain_and_keeps_the_dtype():
    x = 3 * np.random.default_rng(6).standard_normal((4, 32))
    expected, _ = normalise64(x, 1e-6)
    np.testing.assert_allclose(
        rms_normalise(jnp.asarray(x, jnp.float32), 1e-6), expected, rtol=1e-5
    )
    low = rms_normalise(jnp.asarray(x, jnp.bfloat16), 1e-6)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rms_normalise(jnp.zeros((2, 4)), 1e-6), np.zeros((2, 4)))
