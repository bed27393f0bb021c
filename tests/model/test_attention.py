"""Every form of causal attention against a loop over queries in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.errors import UserError
from spectra_jax.model.attention import ATTENTION, causal_blocks, get_attention, reference, splash
from spectra_jax.model.attention_kernels import splash_kernel

B, N, H = 2, 4, 6


def attention64(q, k, v):
    """Query head n reads key-value head n // (N/K); position t reads positions 0..t."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = k[b, : t + 1, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
        share = np.exp(scores - scores.max())
        out[b, t, n] = share @ v[b, : t + 1, n // group] / share.sum()
    return out


def draw(T, K, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(2 * rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (N, K, K)
    ]


@pytest.mark.parametrize(
    ("T", "blocks", "K"),
    [(1, 1, 4), (1, 4, 2), (8, 1, 2), (8, 4, 4), (11, 4, 1), (11, 3, 2), (7, 5, 4), (5, 9, 2)],
)
def test_causal_blocks(T, blocks, K):
    """Ragged lengths too, and more blocks than tokens."""
    q, k, v = draw(T, K)
    expected = attention64(*map(np.asarray, (q, k, v)))
    np.testing.assert_allclose(causal_blocks(q, k, v, blocks), expected, atol=1e-5)


def test_reference_is_dense():
    q, k, v = draw(9, 2)
    expected = attention64(*map(np.asarray, (q, k, v)))
    np.testing.assert_allclose(reference(q, k, v, 1), expected, atol=1e-5)
    np.testing.assert_array_equal(reference(q, k, v, 5), reference(q, k, v, 1))


def test_gradients_do_not_depend_on_the_blocks():
    q, k, v = draw(11, 2)
    target = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def gradients(blocks):
        loss = lambda *a: jnp.sum(jnp.tanh(causal_blocks(*a, blocks)) * target)  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for one, other in zip(gradients(1), gradients(4)):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.abs(one).max()))


def test_large_scores_stay_finite():
    q, k, v = draw(6, 4)
    out = causal_blocks(1e3 * q, 1e3 * k, v, 2)
    assert jnp.isfinite(out).all()
    np.testing.assert_allclose(out, attention64(*map(np.asarray, (1e3 * q, 1e3 * k, v))), atol=1e-4)


def test_low_precision_keeps_its_dtype_and_softmax_in_float32():
    q, k, v = draw(9, 2)
    low = causal_blocks(*(a.astype(jnp.bfloat16) for a in (q, k, v)), 2)
    assert low.dtype == jnp.bfloat16
    rounded = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (q, k, v))
    np.testing.assert_allclose(np.asarray(low, np.float64), attention64(*rounded), atol=0.03)


def test_unknown_attention():
    assert set(ATTENTION) == {"reference", "causal_blocks", "splash", "cudnn", "flash"}
    with pytest.raises(
        UserError, match="attention='causal_block' is not one of .*; did you mean causal_blocks?"
    ):
        get_attention("causal_block")


@pytest.mark.parametrize("K", [2, 1])
def test_the_kernel_of_tpus(K):
    """In its interpreter, forward and backward, with grouped queries; on a mesh each device its own heads."""
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, 128, heads, 64)), jnp.float32) for heads in (2, K, K, 2))
    expected, back = jax.vjp(lambda *a: reference(*a, 1), q, k, v)
    found, splash_back = jax.vjp(partial(splash_kernel, interpret=True), q, k, v)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for one, other in zip(splash_back(g), back(g)):
        np.testing.assert_allclose(one, other, atol=2e-5)
    if K == 2:
        with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"))):
            spread = [jax.sharding.reshard(x, jax.P("data", None, "model", None)) for x in (q, k, v)]
            np.testing.assert_allclose(jax.jit(partial(splash_kernel, interpret=True))(*spread), expected, atol=2e-6)


def test_splash_elsewhere_and_at_odd_lengths_is_causal_blocks():
    for T in (128, 11):
        q, k, v = draw(T, 2)
        found, expected = (jax.jit(partial(f, blocks=3))(q, k, v) for f in (splash, causal_blocks))
        np.testing.assert_array_equal(found, expected)
