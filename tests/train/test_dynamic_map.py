"""The 8-bit maps: values of bitsandbytes, and the nearest of them by an exact search, on the edges too."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.quantize.blockwise import table
from spectra_jax.train.dynamic_map import SIGNED, UNSIGNED

MAPS = pytest.mark.parametrize("kind", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])


def written_out(signed: bool) -> np.ndarray:
    """The values as bitsandbytes describes them, in float64."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middles = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values)


@MAPS
def test_values(kind):
    exact, theirs = written_out(kind.signed), bnb.create_dynamic_map(signed=kind.signed).numpy()
    print("rtol", *[np.max(np.abs(kind.values - t) / np.where(t == 0, 1, np.abs(t))) for t in (exact, theirs)])
    np.testing.assert_allclose(kind.values, exact, rtol=1.2e-7)
    np.testing.assert_allclose(kind.values, theirs, rtol=2.4e-7)  # which computes in float32
    assert (np.diff(kind.values) > 0).all()
    if kind.signed:
        np.testing.assert_allclose(kind.values, table("dynamic", 8), rtol=1.2e-7)  # that of quantized weights


@MAPS
def test_compiled_or_not_a_value_has_the_same_bits(kind):
    codes = np.random.default_rng(0).integers(0, 256, (3, 1000)).astype(np.uint8)
    found = jax.jit(lambda codes: 0.5 * kind.value(codes))(codes)
    np.testing.assert_array_equal(found, np.float32(0.5) * kind.values[codes])


def numbers(kind) -> np.ndarray:
    """In [-1, 1] at every scale; all values, all midpoints and what is next to them."""
    rng = np.random.default_rng(0)
    some = rng.uniform(-1 if kind.signed else 0, 1, 20_000) * 10.0 ** rng.uniform(-9, 0, 20_000)
    values = kind.values.astype(np.float64)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(side)) for side in (-2, 2)]
    edges = [0.0, -0.0, 1.0, 1e-45, 1e-40, *([-1.0, -1e-45, -1e-40] if kind.signed else [])]
    return np.concatenate([some.astype(np.float32), kind.values, middles, *near, np.float32(edges)])


@MAPS
@pytest.mark.parametrize("how", ["compared", "binned", "nearest"])
def test_the_nearest_value(kind, how):
    x = numbers(kind)
    exact = np.argmin(np.abs(x[:, None].astype(np.float64) - kind.values.astype(np.float64)), axis=1)
    np.testing.assert_array_equal(jax.jit(getattr(kind, how))(x), exact)
    middles = (kind.values[1:].astype(np.float64) + kind.values[:-1]) / 2
    ties = np.flatnonzero(middles.astype(np.float32) == middles)
    assert len(ties) > 50
    np.testing.assert_array_equal(jax.jit(getattr(kind, how))(middles[ties].astype(np.float32)), ties)


@MAPS
def test_what_is_no_number_reads_no_foreign_memory(kind):
    """Steps with it are skipped; it must have some code all the same."""
    x = jnp.asarray([jnp.nan, -jnp.nan, jnp.inf, -jnp.inf])
    assert jax.jit(kind.binned)(x).shape == jax.jit(kind.compared)(x).shape == (4,)


def test_tpus_look_nothing_up():
    """They compare instead."""
    both = lambda x: SIGNED.value(SIGNED.nearest(x))  # noqa: E731
    traced = jax.jit(both).trace(jax.ShapeDtypeStruct((8, 256), "float32"))
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu")}
    assert "gather" in text["cpu"] and "gather" not in text["tpu"]
    assert text["tpu"].count("stablehlo.compare") > 255 > text["cpu"].count("stablehlo.compare")
