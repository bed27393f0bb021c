"""A base and what is added to it: the matrix that it stands for, and every bit that it takes."""

import jax
import jax.numpy as jnp
import numpy as np

from spectra_jax.weights import packed as packing
from spectra_jax.weights.delta import Delta, LowRank
from spectra_jax.weights.form import describe, size_in_bits, skeleton
from spectra_jax.weights.frozen import Frozen
from spectra_jax.weights.grid import Grid

M, N = 12, 8
rng = np.random.default_rng(0)
BASE = rng.standard_normal((M, N)).astype(np.float16)


def grid(m: int, n: int, bits: int, groups: int) -> Grid:
    codes, zeros = rng.integers(0, 2**bits, (m, n)), rng.integers(0, 2**bits, (groups, n))
    return Grid(jnp.uint8(codes), jnp.float16(rng.random((groups, n)) + 0.1), jnp.uint8(zeros), bits=bits)


def low_rank(r: int, bits: int) -> LowRank:
    return LowRank(grid(M, r, bits, 3), jnp.float32(rng.random(r) + 0.1), grid(r, N, bits, 1))


def by_hand(x: Grid) -> np.ndarray:
    """The matrix of a grid in float64."""
    codes, zeros, scales = (np.float64(a) for a in (x.codes, x.zeros, x.scales))
    repeat = len(codes) // len(scales)
    return (codes - np.repeat(zeros, repeat, 0)) * np.repeat(scales, repeat, 0)


def product(part: LowRank) -> np.ndarray:
    return by_hand(part.down) @ np.diag(np.float64(part.values)) @ by_hand(part.up)


def banded() -> tuple[Delta, np.ndarray]:
    first, second = low_rank(2, 8), low_rank(4, 3)
    expected = np.float64(BASE) + product(first) + product(second)
    return Delta(Delta(jnp.asarray(BASE), first), second), expected


def test_bands_add_up():
    form, expected = banded()
    np.testing.assert_allclose(form.dequantize(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert form.dequantize().dtype == jnp.float32


def test_bits_of_bands():
    form, _ = banded()
    codes = 8 * 2 * (M + N) + 3 * 4 * (M + N)
    # Of each factor's groups a scale of 16 bits and a zero at the width of codes; of each vector a singular value.
    groups = (16 + 8) * (3 * 2 + N) + (16 + 3) * (3 * 4 + N) + 32 * (2 + 4)
    assert form.weights == M * N
    assert form.delta_bits == codes + groups
    assert form.stored_bits() == codes + groups + 16 * M * N
    assert form.paper_bits() == codes  # no base, no scales: the paper's count


def test_floats_and_signs():
    down, up = (rng.standard_normal(shape).astype(np.float16) for shape in ((M, 2), (2, N)))
    plain = Delta(jnp.asarray(BASE), LowRank(jnp.asarray(down), jnp.ones(2), jnp.asarray(up)))
    np.testing.assert_allclose(plain.dequantize(), np.float64(BASE) + np.float64(down) @ np.float64(up), atol=1e-6)
    assert plain.delta_bits == 16 * 2 * (M + N) + 64 and plain.paper_bits() == 16 * 2 * (M + N)
    signs = rng.choice([-1, 1], (M, N))
    form = Delta(jnp.float32(BASE), Frozen(jnp.int8(signs), jnp.full(1, 0.25), 0, code_bits=1, counted_bits=1.0))
    np.testing.assert_array_equal(form.dequantize(), np.float32(BASE) + 0.25 * np.float32(signs))
    assert (form.delta_bits, form.paper_bits(), form.stored_bits()) == (M * N + 32, M * N, 33 * M * N + 32)


def test_layers_are_stacked_and_described():
    layers = [banded()[0] for _ in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    assert stacked.weights == 3 * M * N and stacked.part.weights == 3 * M * N
    assert stacked.stored_bits() == 3 * layers[0].stored_bits() and stacked.delta_bits == 3 * layers[0].delta_bits
    assert size_in_bits({"w": stacked}) == (stacked.stored_bits(), stacked.paper_bits())
    whole = jax.lax.map(lambda form: form.dequantize(), stacked)
    np.testing.assert_allclose(whole, np.stack([form.dequantize() for form in layers]), atol=1e-5)
    found = describe({"w": stacked})
    arrays = {f"w{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree.leaves_with_path(stacked)}
    again = skeleton(found, arrays, {"w": 0}, lambda array, leaf: array)["w"]
    assert jax.tree.structure(again) == jax.tree.structure(stacked)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again, stacked)))


def test_packed_and_unpacked_they_are_the_same():
    form, like = banded()[0], jax.ShapeDtypeStruct((M, N), "float32")
    packed = packing.pack({"w": form})
    assert packed["w"].part.down.codes.data.shape == (3 * 2, 4)  # 12 codes of 3 bits, in eights
    again = packing.unpack(packed, {"w": like})["w"]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(form), jax.tree.leaves(again), strict=True))


def test_a_spread_matrix_stays_spread():
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])
    form, _ = banded()
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, jax.P("data", "model") if x.shape == (M, N) else jax.P())  # noqa: E731
        spread = jax.jit(lambda form: form.dequantize())(jax.tree.map(place, form))
    np.testing.assert_allclose(spread, form.dequantize(), rtol=1e-6, atol=1e-6)
    assert spread.sharding.spec == jax.P("data", "model")
