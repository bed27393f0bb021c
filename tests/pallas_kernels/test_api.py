"""The product by every implementation that serves here, forward and gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, reference
from pallas_kernels.packing import Packed, pack

SCALES = {"one": (1, 1), "shards of inputs": (2, 1), "shards of outputs": (1, 4), "per output": (1, 96),
          "per group": (4, 96)}


def case(m, n, scales, layout="2bit", seed=0):
    rng = np.random.default_rng(seed)
    c = rng.integers(-1, 2, (m, n)).astype(np.int8)
    s = rng.uniform(0.5, 2, scales).astype(np.float32)
    matrix = c * np.repeat(np.repeat(s.astype(np.float64), m // scales[0], 0), n // scales[1], 1)
    return Packed(pack(jnp.asarray(c), layout), jnp.asarray(s), m, n, layout), matrix, rng


@pytest.mark.parametrize("layout", ["2bit", "5trit"])
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_product_and_gradient(scales, layout):
    packed, matrix, rng = case(64, 96, scales, layout)
    x, g = (rng.standard_normal((3, 5, k)).astype(np.float32) for k in (64, 96))
    y, back = jax.vjp(lambda x: api.ternary_matmul(x, packed), jnp.asarray(x))
    bound = np.abs(x).max(-1, keepdims=True) * 2**-14.9 * np.abs(matrix).sum(0) + 1e-4  # of two digits
    assert np.all(np.abs(y - x @ matrix) <= bound)
    np.testing.assert_allclose(back(jnp.asarray(g))[0], g @ matrix.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(reference.ternary_matmul(jnp.asarray(x), packed), x @ matrix, rtol=1e-5, atol=1e-4)


def test_two_digits_hold_sixteen_bits():
    x = np.random.default_rng(0).standard_normal((7, 100)).astype(np.float32) * 10
    x[3] = 0
    high, low, step = reference.digits(jnp.asarray(x))
    assert high.dtype == low.dtype == jnp.int8
    found = np.asarray(step) * (128.0 * np.asarray(high, np.float64) + np.asarray(low))
    assert np.all(np.abs(found - x) <= np.abs(x).max(1, keepdims=True) / 2**14.98)


def test_misfits_are_refused():
    packed, *_ = case(64, 96, (1, 1))
    with pytest.raises(ValueError, match="x has 65 inputs and the matrix 64"):
        api.ternary_matmul(jnp.ones((2, 65)), packed)
    with pytest.raises(ValueError, match="x is int32"):
        api.ternary_matmul(jnp.ones((2, 64), jnp.int32), packed)
    with pytest.raises(ValueError, match="no implementation 'tpuu'"):
        api.ternary_matmul(jnp.ones((2, 64)), packed, implementation="tpuu")
