"""Packed codes are the bytes of the layouts' definitions, and come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import Packed, expand, pack, unpack


def codes(*shape, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)


@pytest.mark.parametrize("layout", ["2bit", "5trit"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (5, 3), (512, 7), (3, 515, 2), (2, 2, 9, 4)])
def test_codes_come_back(layout, shape):
    c = codes(*shape)
    packed = pack(jnp.asarray(c), layout)
    per_byte = {"2bit": 4, "5trit": 5}[layout]
    assert packed.shape == (*shape[:-2], -(-shape[-2] // per_byte), shape[-1]) and packed.dtype == jnp.uint8
    assert np.array_equal(unpack(packed, shape[-2], layout), c)
    assert np.array_equal(jax.jit(pack, static_argnums=1)(jnp.asarray(c), layout), packed)


def test_every_byte_is_the_definition():
    """All 81 and 243 combinations, in whole numbers."""
    four = np.array(np.meshgrid(*[[-1, 0, 1]] * 4, indexing="ij")).reshape(4, -1).astype(np.int8)
    expected = [sum((int(c) % 4) << (2 * k) for k, c in enumerate(column)) for column in four.T]
    assert pack(jnp.asarray(four), "2bit")[0].tolist() == expected
    five = np.array(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij")).reshape(5, -1).astype(np.int8)
    values = [sum((int(c) + 1) * 3 ** (4 - k) for k, c in enumerate(column)) for column in five.T]
    assert pack(jnp.asarray(five), "5trit")[0].tolist() == [-(-256 * value // 243) for value in values]
    assert np.array_equal(unpack(pack(jnp.asarray(five), "5trit"), 5, "5trit"), five)


def test_codes_outside_the_alphabet_are_refused():
    with pytest.raises(ValueError, match="-1, 0 and 1; these go from -1 to 2"):
        pack(jnp.array([[-1], [2]], jnp.int8))


def test_a_truncated_matrix_is_refused():
    packed = pack(jnp.asarray(codes(512, 4)))
    with pytest.raises(ValueError, match="512 inputs at 4 codes a byte take 128 rows; there are 127"):
        unpack(packed[:-1], 512)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="'3bit' is not canonical; there are 2bit, 5trit"):
        pack(jnp.asarray(codes(4, 4)), "3bit")


@pytest.mark.parametrize("g, s", [(1, 1), (3, 1), (1, 4), (1, 8), (6, 8)])
def test_scales_multiply_their_blocks(g, s):
    m, n = 12, 8
    c, scales = codes(m, n), np.random.default_rng(1).uniform(0.5, 2, (g, s)).astype(np.float32)
    expected = np.array([[c[i, j] * scales[i * g // m, j * s // n] for j in range(n)] for i in range(m)])
    packed = Packed(pack(jnp.asarray(c)), jnp.asarray(scales), m, n)
    assert np.array_equal(packed.dequantize(), expected)


def test_scales_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"scales \(5, 1\) do not divide a matrix of 12 inputs"):
        expand(jnp.ones((5, 1)), 12, 8)
