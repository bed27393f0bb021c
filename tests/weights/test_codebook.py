"""Matrices of any levels: what they expand to, the bits they take, and the search for the nearest value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.sharding import AXES
from spectra_jax.weights.codebook import SCALE_BLOCK, ByteScales, Codebook, nearest_codes
from spectra_jax.weights.form import describe, skeleton

P = jax.P
EVEN = np.linspace(-1, 1, 256, dtype=np.float32)
in_bytes = jax.jit(ByteScales.of)
expanded = jax.jit(lambda form: form.dequantize())


def some_codebook(m=12, n=8, groups=3, bits=4, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (m, n)).astype(np.uint8)
    scales = rng.uniform(0.5, 2, (groups, n)).astype(np.float32)
    table = rng.uniform(-1, 1, 2**bits).astype(np.float32)  # in no order
    dense = table.astype(np.float64)[codes] * np.repeat(scales, m // groups, axis=0)
    return Codebook(jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(table), bits), dense


def test_what_it_stands_for():
    book, dense = some_codebook()
    np.testing.assert_allclose(expanded(book), dense, rtol=1e-6)
    other, more = some_codebook(seed=1)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), book, other)
    np.testing.assert_allclose(jax.lax.map(lambda one: one.dequantize(), stacked), [dense, more], rtol=1e-6)


def test_bits():
    book, _ = some_codebook()
    assert book.stored_bits() == 4 * 96 + 32 * 24 + 32 * 16
    assert book.paper_bits() == 4 * 96 + 32 * 24
    large = Codebook(jnp.zeros((1024, 64), jnp.uint8), jnp.ones((16, 64)), jnp.zeros(16), 4)
    assert large.paper_bits() == 4.5 * 1024 * 64
    scales = in_bytes(large.scales, EVEN)
    double = Codebook(large.codes, scales, large.table, 4)
    # 1024 scales in 8 bits, four scales of 256 of them each, one offset: QLoRA's 4.127, and the offset
    assert double.paper_bits() == 4 * 1024 * 64 + 8 * 1024 + 32 * 4 + 32
    assert abs((double.paper_bits() - 32) / 2**16 - 4.127) < 1e-3
    assert double.stored_bits() == double.paper_bits() + 32 * (16 + 256)


def nearest(x, table):
    """In float64: the value with the least distance, of two the lower."""
    order = np.argsort(table, kind="stable")
    distance = np.abs(x[..., None].astype(np.float64) - table[order].astype(np.float64))
    return order[np.argmin(distance, axis=-1)]


@pytest.mark.parametrize("size", [4, 16, 256])
def test_the_nearest_value(size):
    rng = np.random.default_rng(size)
    table = rng.permutation(np.linspace(-1, 1, size + 1)[:size]).astype(np.float32)
    x = rng.uniform(-1.2, 1.2, (40, 50)).astype(np.float32)
    found = nearest_codes(jnp.asarray(x), jnp.asarray(table))
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, nearest(x, table))


def test_of_two_values_as_near_the_lower():
    table = jnp.asarray([1.0, -0.5, 0.0, 0.5])
    halves = jnp.asarray([-0.25, 0.25, 0.75, -0.5, 0.0, -9.0, 9.0])
    np.testing.assert_array_equal(nearest_codes(halves, table), [1, 2, 3, 1, 2, 1, 0])


def test_scales_in_8_bits():
    rng = np.random.default_rng(2)
    scales = rng.lognormal(0, 0.3, (5, 120)).astype(np.float32)  # 600: no multiple of 256
    table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    form = in_bytes(jnp.asarray(scales), table)
    line = scales.T.reshape(-1).astype(np.float64)  # bitsandbytes' order: outputs, then groups
    line -= line.mean()
    blocks = np.pad(line, (0, 3 * SCALE_BLOCK - 600)).reshape(3, SCALE_BLOCK)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    codes = nearest(blocks / absmax, table).reshape(-1)[:600]
    np.testing.assert_array_equal(form.codes, codes.reshape(120, 5).T)
    np.testing.assert_allclose(form.scales, absmax[:, 0], rtol=1e-5)
    back = (table[codes] * np.repeat(absmax, SCALE_BLOCK)[:600] + scales.mean(dtype=np.float64)).reshape(120, 5).T
    np.testing.assert_allclose(expanded(form), back, rtol=1e-5)


@pytest.mark.parametrize("spec", [P("data", "model"), P(None, AXES)])
def test_on_a_mesh_as_on_one_device(spec):
    book, dense = some_codebook(m=16, n=8, groups=4)
    dense = jnp.asarray(dense, jnp.float32)
    double = Codebook(book.codes, in_bytes(book.scales, EVEN), book.table, 4)
    codes, more = nearest_codes(dense, book.table), in_bytes(np.tile(book.scales, (2, 1)), EVEN)
    mesh = jax.make_mesh((1, 4, 2), AXES)

    def put(x, spec):
        return jax.device_put(np.asarray(x), jax.NamedSharding(mesh, spec))

    for one in (book, double):
        expected = expanded(one)
        with jax.set_mesh(mesh):
            found = expanded(jax.tree.map(lambda x: put(x, spec if x.shape == one.codes.shape else P()), one))
        assert jax.typeof(found).sharding.spec == spec
        np.testing.assert_allclose(found, expected, rtol=2e-7)  # a bit: product and sum are fused, or not
    with jax.set_mesh(mesh):
        found = jax.jit(nearest_codes)(put(dense, spec), put(book.table, P()))
        spread = in_bytes(put(np.tile(book.scales, (2, 1)), spec), put(EVEN, P()))
    assert jax.typeof(found).sharding.spec == spec
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(spread.codes, more.codes)


def test_a_checkpoint_can_describe_and_rebuild_it():
    book, _ = some_codebook()
    tree = {"w": Codebook(book.codes, in_bytes(book.scales, EVEN), book.table, 4)}
    arrays = {
        "w.codes": tree["w"].codes, "w.table": book.table, "w.scales.codes": tree["w"].scales.codes,
        "w.scales.scales": tree["w"].scales.scales, "w.scales.offset": tree["w"].scales.offset,
        "w.scales.table": tree["w"].scales.table,
    }  # fmt: skip
    again = skeleton(describe(tree), arrays, {"w": jnp.zeros((12, 8))}, lambda array, leaf: array)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    np.testing.assert_array_equal(expanded(again["w"]), expanded(tree["w"]))
