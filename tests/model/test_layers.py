"""RMSNorm and rotary embeddings against float64 formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.model.layers import RMSNorm, rotary_tables, rotate

B, T, N, H = 2, 7, 3, 8


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm(eps):
    rng = np.random.default_rng(0)
    x, gain = 3 * rng.standard_normal((B, T, H)), rng.standard_normal(H)
    norm = RMSNorm(H, eps)
    np.testing.assert_array_equal(norm.gain[...], np.ones(H))
    norm.gain[...] = jnp.asarray(gain, jnp.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_low_precision_takes_its_statistics_in_float32():
    x = jnp.full((1, 1, 4096), 1.0, jnp.bfloat16) * 0.01
    out = RMSNorm(4096, 1e-5)(
        x
    )  # a sum of 4096 squares in bfloat16 would stop growing at 256 of them
    assert out.dtype == jnp.bfloat16
    value = float(x[0, 0, 0])
    np.testing.assert_allclose(
        out.astype(jnp.float32), value / np.sqrt(value**2 + 1e-5), rtol=2**-8
    )


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_rotation_multiplies_complex_pairs(base):
    """Dim i with dim i + H/2 is a complex number that turns by position times base^(-2i/H)."""
    x = np.random.default_rng(1).standard_normal((B, T, N, H))
    angle = np.arange(T)[:, None] * base ** (-2 * np.arange(H // 2) / H)
    turned = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)[None, :, None]
    found = rotate(jnp.asarray(x, jnp.float32), rotary_tables(T, H, base))
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(2).standard_normal((2, 1, 1, 1, H))
    tables = rotary_tables(40, H, 100.0)
    turned = [
        rotate(jnp.tile(jnp.asarray(a, jnp.float32), (1, 40, 1, 1)), tables)[0, :, 0]
        for a in (q, k)
    ]
    scores = np.asarray(turned[0] @ turned[1].T)
    for distance in (0, 3, 17):
        along = np.diagonal(scores, -distance)
        np.testing.assert_allclose(along, along[0], atol=1e-5)


def test_tables_at_long_contexts():
    """Angles up to 4096 radians, in float32."""
    cos, sin = rotary_tables(4096, 64, 10_000.0)
    angle = np.arange(4096)[:, None] * 10_000.0 ** (-2 * np.arange(32) / 64)
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-3)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-3)
