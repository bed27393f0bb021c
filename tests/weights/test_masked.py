"""Matrices in two parts, and those of tables: what they stand for, and every bit that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.weights.form import describe, size_in_bits, skeleton
from spectra_jax.weights.grid import Grid
from spectra_jax.weights.masked import Masked
from spectra_jax.weights.tables import Tables

M, N = 10, 6
rng = np.random.default_rng(0)
MASK = rng.random((M, N)) < 0.3
KEPT = int(MASK.sum())


def grid() -> Grid:
    codes, zeros = rng.integers(0, 256, (M, N)), rng.integers(0, 256, (1, N))
    scales = rng.random((1, N)) + 0.1
    return Grid(jnp.uint8(codes), jnp.float16(scales), jnp.uint8(zeros), bits=8)


def tables(values: int, split: int = 0, block: int = 4) -> Tables:
    """Blocks of 4, 4 and 2 inputs; with a split, about half of the inputs are of each kind."""
    codes = rng.integers(0, split or values, (M, N))
    if split:
        codes = np.where(rng.random((M, 1)) < 0.5, codes, split + codes)
    table = rng.standard_normal((values, -(-M // block), N))
    return Tables(jnp.uint8(codes), jnp.float16(table), block, split)


def entries(form: Tables) -> np.ndarray:
    """The matrix of a form of tables, one entry after the other."""
    codes, table = np.asarray(form.codes), np.float64(form.tables)
    return np.array([[table[codes[i, j], i // form.block, j] for j in range(N)] for i in range(M)])


@pytest.mark.parametrize("values, split", [(2, 0), (8, 4), (5, 0)])
def test_tables_are_looked_up(values, split):
    form = tables(values, split)
    np.testing.assert_array_equal(form.dequantize(), entries(form))
    assert form.dequantize().dtype == jnp.float32


def test_bits_of_tables():
    two, eight, five = tables(2), tables(8, 4), tables(5)
    numbers = 3 * N * 16  # of one value, over all blocks
    assert two.stored_bits() == M * N + 2 * numbers and two.paper_bits() == M * N
    # BiLLM: 2 bits a weight, 1 an input, 8 numbers; its paper counts a sign, and a second of salient inputs.
    salient = int((np.asarray(eight.codes)[:, 0] >= 4).sum())
    assert 0 < salient < M
    assert eight.stored_bits() == 2 * M * N + M + 8 * numbers
    assert eight.paper_bits() == M * N + salient * N
    assert five.bits == 3


def test_billm_at_full_size_takes_three_bits_a_weight():
    form = Tables(jnp.zeros((1024, 512), jnp.uint8), jnp.zeros((8, 8, 512), jnp.float16), 128, 4)
    assert form.stored_bits() / form.weights == 3 + 1 / 512  # 2 of codes, 1 of tables, and the map of inputs


def test_masked_floats_and_zeros():
    values = rng.standard_normal((M, N)).astype(np.float16)
    form = Masked(jnp.asarray(MASK), jnp.asarray(values))
    np.testing.assert_array_equal(form.dequantize(), np.where(MASK, np.float32(values), 0))
    assert form.weights == M * N
    assert form.stored_bits() == form.paper_bits() == M * N + 16 * KEPT
    wide = Masked(jnp.asarray(MASK), jnp.float32(values))
    assert wide.stored_bits() == M * N + 32 * KEPT and wide.paper_bits() == M * N + 16 * KEPT


def test_masked_codes_and_signs():
    form = Masked(jnp.asarray(MASK), grid(), tables(2), mask_counted=False)
    kept = np.float32(form.kept.scales) * (np.float32(form.kept.codes) - np.float32(form.kept.zeros))
    np.testing.assert_array_equal(form.dequantize(), np.where(MASK, kept, np.float32(entries(form.rest))))
    others, numbers = M * N - KEPT, 2 * 3 * N * 16
    assert form.stored_bits() == M * N + (8 * KEPT + N * (16 + 8)) + (others + numbers)
    assert form.paper_bits() == 8 * KEPT + others  # PB-LLM's own account: its 1.7 bits at a share of 0.1


def test_layers_are_stacked_and_described():
    layers = [Masked(jnp.asarray(MASK), grid(), tables(2)) for _ in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    assert stacked.weights == 3 * M * N
    assert stacked.stored_bits() == 3 * layers[0].stored_bits()
    assert size_in_bits({"w": stacked}) == (stacked.stored_bits(), stacked.paper_bits())
    whole = jax.lax.map(lambda form: form.dequantize(), stacked)
    np.testing.assert_array_equal(whole, np.stack([form.dequantize() for form in layers]))

    found = describe({"w": stacked})
    assert found["w"]["form"] == "Masked" and found["w"]["rest"]["block"] == 4
    arrays = {f"w{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree.leaves_with_path(stacked)}
    again = skeleton(found, arrays, {"w": 0}, lambda array, leaf: array)["w"]
    assert jax.tree.structure(again) == jax.tree.structure(stacked)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again, stacked)))


def test_a_spread_matrix_stays_spread():
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    form = Masked(jnp.asarray(MASK), grid(), tables(8, 4))
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, jax.P("data", "model") if x.shape == (M, N) else jax.P())  # noqa: E731
        spread = jax.jit(lambda form: form.dequantize())(jax.tree.map(place, form))
    np.testing.assert_array_equal(spread, form.dequantize())
    assert spread.sharding.spec == jax.P("data", "model")
