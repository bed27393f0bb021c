"""The TPU kernel in Pallas's TPU interpreter against float64: MXUs of int8 (v5e), bf16 by fp8 (v7x) and bf16 (v4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import api, packing, tpu
from pallas_kernels.packing import Packed, pack

SIZES = [(512, 1280), (768, 2048), (1024, 2560), (1280, 3072), (1536, 4096), (1792, 5120), (2048, 6144), (2304, 7680),
         (3072, 9216)]  # (D, F) of the nine TriLMs, 99M to 3.9B
BATCHES = (1, 3, 8, 17, 70, 130)
SHAPES = {"D x D": lambda D, F: (D, D), "D x F": lambda D, F: (D, F), "F x D": lambda D, F: (F, D)}
# How far an activation may be off: a share of its row's largest, and a share of itself. Half a step of two int8 digits
# or one, rounded in float32; two bf16.
OFF = {("v5e", 16): (0.501 / 16256, 0), ("v5e", 8): (0.501 / 127, 0), ("v7x", 16): (0, 2.0**-17),
       ("v4", 16): (0, 2.0**-17), ("v7x", 8): (0, 2.0**-8)}


def matrix(m, n, scales=(1, 1), seed=0):
    """A random ternary matrix, packed, and in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (m, n), np.int8)
    s = rng.uniform(0.01, 0.1, scales).astype(np.float32)
    dense = codes * np.repeat(np.repeat(s.astype(np.float64), m // scales[0], 0), n // scales[1], 1)
    return Packed(pack(jnp.asarray(codes)), jnp.asarray(s), m, n), dense, rng


def product(generation, x, packed, **options):
    """By the kernel in the interpreter, in float64."""
    with tpu.target(generation), pltpu.force_tpu_interpret_mode():
        y = jax.jit(lambda x, packed: tpu.matmul(x, packed, **options))(x, packed)
        return np.asarray(y, np.float64), y.dtype


def check(generation, x, packed, dense, bits=16, outliers=False, **options):
    """Every output within what its activations may be off, the sum's rounding in float32, the result's in its dtype."""
    y, dtype = product(generation, x, packed, activation_bits=bits, **options)
    assert dtype == x.dtype
    x = np.asarray(x, np.float64)
    exact, size = x @ dense, np.abs(x) @ np.abs(dense)
    # A scale per input multiplies x first: of x times scale the largest counts.
    scale = np.abs(dense).max(1) if packed.scales.shape[0] > 1 else np.ones(dense.shape[0])
    of_row, of_each = OFF[generation, bits]
    terms = (np.abs(dense) / scale[:, None]).sum(0)
    allowed = of_row * np.outer(np.abs(x * scale).max(1), terms) + (of_each + 2.0**-20) * size
    allowed += (2.0**-8 if dtype == jnp.bfloat16 else 2.0**-24) * np.abs(exact)
    assert np.all(np.abs(y - exact) <= allowed), (np.abs(y - exact) / allowed.clip(1e-30)).max()
    if dtype == jnp.float32 and not outliers:
        limit = {16: 1e-4, 8: 1.5e-2}[bits] if of_row else {16: 4e-6, 8: 3e-3}[bits]
        assert np.linalg.norm(y - exact) < limit * np.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(512, 256), (3, 256, 128), (2, 2, 130, 7), (1, 1)])
def test_codes_come_back(shape):
    codes = np.random.default_rng(0).integers(-1, 2, shape, np.int8)
    m, n = shape[-2:]
    packed = Packed(pack(jnp.asarray(codes)), jnp.ones((*shape[:-2], 1, 1)), m, n)
    converted = tpu.convert(packed)
    assert converted.data.dtype == jnp.int32 and converted.layout == "tpu"
    assert converted.data.shape == (*shape[:-2], -(-m // 128) * 8, -(-n // 128) * 128)
    assert np.array_equal(tpu.codes(converted), codes)
    assert np.array_equal(jax.jit(tpu.codes)(jax.jit(tpu.convert)(packed)), codes)
    assert tpu.convert(converted) is converted


def test_words_are_the_layouts_definition():
    """Read bit by bit, in Python's whole numbers."""
    codes = np.random.default_rng(1).integers(-1, 2, (256, 128), np.int8)
    words = np.asarray(tpu.convert(Packed(pack(jnp.asarray(codes)), jnp.ones((1, 1)), 256, 128)).data)
    for k, r, b, j, column in np.random.default_rng(2).integers(0, [2, 8, 4, 4, 128], (500, 5)):
        bits = (int(words[8 * k + r, column]) >> (8 * b + 2 * j)) & 3
        assert {0: 0, 1: 1, 3: -1}[bits] == codes[128 * k + 32 * j + 4 * r + b, column]


@pytest.mark.parametrize(
    "generation, dtype", [("v4", "float32"), ("v4", "bfloat16"), ("v5e", "float32"), ("v7x", "bfloat16")]
)
def test_one_scale(generation, dtype):
    packed, dense, rng = matrix(512, 256)
    check(generation, jnp.asarray(rng.standard_normal((3, 512)), dtype), packed, dense)


@pytest.mark.parametrize("generation, dtype", [("v5e", "bfloat16"), ("v7x", "float32")])
@pytest.mark.parametrize("scales", [(4, 1), (1, 4), (1, 256)], ids=str)
def test_more_scales(generation, dtype, scales):
    packed, dense, rng = matrix(512, 256, scales)
    check(generation, jnp.asarray(rng.standard_normal((3, 512)), dtype), packed, dense)


@pytest.mark.parametrize("generation", ["v5e", "v7x"])
def test_one_digit(generation):
    packed, dense, rng = matrix(512, 256)
    check(generation, jnp.asarray(rng.standard_normal((5, 512)), jnp.float32), packed, dense, bits=8)


@pytest.mark.parametrize("generation", ["v4", "v5e", "v7x"])
def test_ragged_dims_empty_rows_and_outliers(generation):
    packed, dense, rng = matrix(300, 200, (1, 8))
    x = rng.standard_normal((11, 300)) * np.where(rng.random((11, 300)) < 0.01, 30, 1)
    x[4] = 0
    check(generation, jnp.asarray(x, jnp.float32), packed, dense, outliers=True)


@pytest.mark.parametrize(
    "generation, blocks",
    [("v5e", (304, 256, 128)), ("v5e", (128, 128, 256)), ("v7x", (128, 512, 128)), ("v4", (128, 256, 128))],
    ids=str,
)
def test_blocks_of_rows_inputs_and_outputs(generation, blocks):
    packed, dense, rng = matrix(512, 256, (1, 2))
    check(generation, jnp.asarray(rng.standard_normal((300, 512)), jnp.float32), packed, dense, blocks=blocks)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_smallest_trilm(shape):
    packed, dense, rng = matrix(*SHAPES[shape](*SIZES[0]))
    check("v5e", jnp.asarray(rng.standard_normal((17, packed.m)), jnp.bfloat16), packed, dense)


@pytest.mark.slow
@pytest.mark.parametrize("size", range(9))
def test_every_trilm(size):
    """Every shape of every size with two batches on v5e and one on v7x and v4; every size with every batch."""
    for k, (_, dims) in enumerate(SHAPES.items()):
        packed, dense, rng = matrix(*dims(*SIZES[size]))
        packed = jax.block_until_ready(jax.jit(tpu.convert)(packed))
        for generation, M, dtype in (
            ("v5e", BATCHES[k], jnp.float32),
            ("v5e", BATCHES[k + 3], jnp.bfloat16),
            (("v7x", "v4")[(size + k) % 2], BATCHES[(size + k) % 6], jnp.float32),
        ):
            check(generation, jnp.asarray(rng.standard_normal((M, packed.m)), dtype), packed, dense)


def test_through_the_api_with_its_gradient(monkeypatch):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "tpu", tpu)
    packed, dense, rng = matrix(256, 128, (2, 1))
    x, g = (jnp.asarray(rng.standard_normal((2, 3, k)), jnp.float32) for k in (256, 128))
    with tpu.target("v5e"), pltpu.force_tpu_interpret_mode():
        for weights in (packed, api.prepare(packed, "tpu")):
            y, back = jax.vjp(jax.jit(lambda x: api.ternary_matmul(x, weights, implementation="tpu")), x)
            exact = np.asarray(x, np.float64) @ dense
            assert np.linalg.norm(y - exact) < 1e-4 * np.linalg.norm(exact)
            np.testing.assert_allclose(back(g)[0], np.asarray(g, np.float64) @ dense.T, rtol=1e-4, atol=1e-5)


def test_it_says_why_it_cannot_serve():
    packed, *_ = matrix(256, 128)
    per_group, *_ = matrix(256, 128, (2, 128))
    x = jax.ShapeDtypeStruct((3, 256), jnp.float32)
    assert "the default device is 'cpu'; this kernel is for TPUs: v4" in tpu.refuses(x, packed)
    with pytest.raises(ValueError, match="the default device is 'cpu'"):
        tpu.matmul(jnp.ones((3, 256)), packed)
    with tpu.target("v6e"):
        assert tpu.refuses(x, packed) is None
        assert "scales (2, 128) of groups and outputs do not factor out" in tpu.refuses(x, per_group)
        assert "x is float16" in tpu.refuses(jax.ShapeDtypeStruct((3, 256), jnp.float16), packed)
        with pytest.raises(ValueError, match=r"blocks \(8, 192, 128\) of a stored matrix \(256, 128\)"):
            tpu.matmul(jnp.ones((3, 256)), packed, blocks=(8, 192, 128))
        with pytest.raises(ValueError, match="activation_bits=4"):
            tpu.matmul(jnp.ones((3, 256)), packed, activation_bits=4)
        with pytest.raises(ValueError, match="'cpu' is not canonical"):
            tpu.convert(Packed(packed.data, packed.scales, 256, 128, "cpu"))
    assert tpu.refuses(x, packed) is not None  # the target ends with its block
    with pytest.raises(ValueError, match="no TPU generation 'v9'; there are v4, v5e"), tpu.target("v9"):
        pass


def test_outside_the_interpreter_nothing_runs_on_a_cpu():
    packed, *_ = matrix(256, 128)
    with tpu.target("v5e"), pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        tpu.matmul(jnp.ones((3, 256)), packed)


def test_the_canonical_layouts_are_what_convert_takes():
    codes = np.random.default_rng(3).integers(-1, 2, (259, 130), np.int8)
    words = [
        tpu.convert(Packed(pack(jnp.asarray(codes), layout), jnp.ones((1, 1)), 259, 130, layout)).data
        for layout in packing.CODES_PER_BYTE
    ]
    assert np.array_equal(*words)
