"""Where the levels lie: against the formulas of the sources in float64, and what each grid promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.quantize import grids

RNG = np.random.default_rng(0)
W = RNG.standard_normal((3, 40, 7))  # three groups of 40 inputs, 7 outputs
W[1, :, 2] = np.abs(W[1, :, 2])  # a run without a negative weight
W[2, :, 3] = 0.0
STEPS = {bits: 2**bits - 1 for bits in range(2, 9)}


def for_rows(levels: grids.Levels) -> grids.Levels:
    """Levels of one group as they combine with its rows."""
    return jax.tree.map(lambda x: x[None] if x.ndim else x, levels)


def expected(grid: str, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Scale and zero of each group and output, from the formulas."""
    low, high = W.min(1), W.max(1)
    a = np.abs(W).max(1)
    half = 2 ** (bits - 1)
    if grid == "gptq":
        return np.where(low < 0, a / (half - 0.5), a / STEPS[bits]), None
    if grid in ("int", "absmax"):
        return a / (half - 1), None
    if grid == "awq":
        scale = np.maximum(high - low, 1e-5) / STEPS[bits]
        return scale, np.clip(-np.round(low / scale), 0, STEPS[bits])
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / STEPS[bits]
    with np.errstate(invalid="ignore"):
        return scale, np.round(-low / scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", grids.GRIDS)
def test_levels(grid, bits):
    levels = grids.fit(jnp.asarray(W, jnp.float32), grid, bits)
    scale, zero = expected(grid, bits)
    full = scale > 0  # a run of zeros has no scale of its own
    np.testing.assert_allclose(np.asarray(levels.scale)[full], scale[full], rtol=1e-6)
    assert np.all(np.asarray(levels.scale) > 0)
    assert (levels.zero is None) == grids.is_symmetric(grid)
    if zero is not None:
        np.testing.assert_array_equal(np.asarray(levels.zero)[full], zero[full])


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_codes_are_the_nearest_levels(grid):
    bits = 3
    levels = for_rows(grids.fit(jnp.asarray(W[0], jnp.float32), grid, bits))
    codes = np.asarray(levels.encode(jnp.asarray(W[0], jnp.float32)))
    low, high = grids.code_range(grid, bits)
    assert codes.min() >= low and codes.max() <= high and np.all(codes == np.round(codes))
    every_code = jnp.broadcast_to(jnp.arange(low, high + 1.0)[:, None], (high - low + 1, 7))
    everything = np.asarray(levels.decode(every_code), np.float64)
    best = np.abs(W[0][:, None] - everything[None]).min(1)
    np.testing.assert_allclose(np.abs(np.asarray(levels.decode(jnp.asarray(codes))) - W[0]), best, atol=1e-5)


def test_symmetric_grids_differ_as_they_should():
    w = jnp.asarray([[1.0], [-1.0], [0.4]])
    top = {}
    for grid in grids.GRIDS:
        levels = for_rows(grids.fit(w, grid, 3))
        top[grid] = float(levels.decode(levels.encode(w))[0, 0])
    assert top["absmax"] == top["int"] == 1.0  # the largest magnitude is a level
    assert top["gptq"] == pytest.approx(3 / 3.5)  # it is cut; the lowest level is -4/3.5
    assert grids.code_range("int", 3) == (-4, 3) and grids.code_range("absmax", 3) == (-3, 3)


def test_the_search_finds_the_smallest_error():
    w = RNG.standard_normal((64, 5))
    w[0] = 6.0  # an outlier that a smaller range had better cut
    plain, searched = (grids.fit(jnp.asarray(w, jnp.float32), "gptq", 3, mse=mse) for mse in (False, True))

    def error(scale: np.ndarray) -> np.ndarray:
        codes = np.clip(np.round(w / scale), -4, 3)
        return (np.abs(codes * scale - w) ** 2.4).sum(0)

    whole = np.asarray(plain.scale, np.float64)
    tried = np.stack([error(whole * (1 - k / 100)) for k in range(80)])
    np.testing.assert_allclose(error(np.asarray(searched.scale, np.float64)), tried.min(0), rtol=1e-4)
    assert np.all(tried.min(0) < tried[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_are_what_will_be_stored(dtype):
    w = jnp.asarray(W[0] * 1e-5, jnp.float32)  # scales of float16 are subnormal here
    scale = grids.fit(w, "gptq", 4, scale_dtype=dtype).scale
    np.testing.assert_array_equal(scale, scale.astype(dtype).astype(jnp.float32))
    tiny = grids.fit(w * 1e-9, "gptq", 4, scale_dtype=dtype).scale
    assert np.all(np.asarray(tiny.astype(dtype)) > 0)
