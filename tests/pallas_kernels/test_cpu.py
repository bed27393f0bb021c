"""The C++ kernel against float64, on every path that this processor has; the library built and not built."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import api, build, cpu
from pallas_kernels.packing import Packed, expand, pack

SIZES = [(512, 1280), (768, 2048), (1024, 2560), (1280, 3072), (1536, 4096), (1792, 5120), (2048, 6144), (2304, 7680),
         (3072, 9216)]  # D, F
PATHS = ["avx512vnni", "avx2", "plain"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "cpu", cpu)


@pytest.fixture
def paths():
    """What is here. Without a compiler nothing is, and -rs says so."""
    packed, *_ = case(256, 4)
    if reason := cpu.refuses(jax.ShapeDtypeStruct((1, 256), jnp.float32), packed):
        pytest.skip(f"THE CPU KERNEL IS NOT TESTED: {reason}")
    return cpu.paths()


def case(m, n, scales=(1, 1), seed=0):
    """Weights as the kernel takes them, and the matrix in float64."""
    rng = np.random.default_rng(seed)
    c = rng.integers(-1, 2, (m, n), np.int8)
    s = rng.uniform(0.5, 2, scales).astype(np.float32)
    matrix = c * np.repeat(np.repeat(s.astype(np.float64), m // scales[0], 0), n // scales[1], 1)
    return cpu.convert(Packed(pack(jnp.asarray(c)), jnp.asarray(s), m, n)), matrix, rng


def bound(x, weights, bits, block):
    """Of the error of each output: the activations' rounding, and float32's in a few factors and a sum of blocks.

    2^-bits of a block's largest for every activation of it; scales along the inputs alone belong to x.
    """
    c = np.abs(np.asarray(cpu.codes(weights), np.float64))
    along_inputs = weights.scales.shape[1] == 1
    scale = np.broadcast_to(np.asarray(expand(weights.scales, weights.m, weights.n), np.float64), c.shape)
    x = np.abs(x.astype(np.float64)) * (scale[:, 0] if along_inputs else 1)
    w = c if along_inputs else c * scale
    starts = np.arange(0, weights.m, block)
    largest = np.maximum.reduceat(x, starts, 1)
    return 2.0**-bits * largest @ np.add.reduceat(w, starts, 0) + 2.0**-21 * x @ w


@pytest.mark.parametrize("path", PATHS)
def test_each_path_is_tested_where_the_processor_has_it(paths, path):
    assert paths == [name for name in PATHS if name in paths] and paths[-1] == "plain"
    if path not in paths:
        weights, *_ = case(256, 4)
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"this processor has no path '{path}'"):
            cpu.matmul(jnp.ones((1, 256)), weights, path=path).block_until_ready()
        pytest.skip(f"PATH {path} IS NOT TESTED: this processor has {', '.join(paths)}")


@pytest.mark.parametrize("D, F", SIZES)
def test_shapes_of_the_suite(paths, D, F):
    for m, n in ((D, D), (D, F), (F, D)):
        weights, matrix, rng = case(m, n)
        x = rng.standard_normal((2, m)).astype(np.float32)
        found = [np.asarray(cpu.matmul(jnp.asarray(x), weights, path=path)) for path in paths]
        assert all(np.array_equal(y, found[0]) for y in found)  # sums are whole numbers: no path rounds differently
        expected = x @ matrix
        # Roundings are uniform and independent, so their sum has a known deviation: nothing of the digits is lost.
        step = np.abs(x).max(1) / (127 * 128) * float(weights.scales[0, 0])
        deviation = step * np.sqrt(np.count_nonzero(matrix, 0).mean() / 12)
        assert np.all(np.std(found[0] - expected, axis=1) / deviation < 1.15)
        assert np.all(np.abs(found[0] - expected) < 6 * deviation[:, None])


@pytest.mark.parametrize("scales", [(1, 1), (3, 1), (1, 5), (1, 85), (3, 85)])
@pytest.mark.parametrize("m", [768, 600])
def test_any_rows_and_scales(paths, m, scales):
    """m and n that fill no span and no tile; rows that fill no tile."""
    if scales == (3, 85) and m == 600:
        return  # groups of 200, see the refusals
    weights, matrix, rng = case(m, 85, scales)
    assert np.array_equal(cpu.codes(weights), np.sign(matrix))
    block = m // 3 if scales == (3, 85) else m
    for M in (1, 2, 3, 7, 8, 17, 64):
        x = rng.standard_normal((M, m)).astype(np.float32) * np.exp(rng.standard_normal((M, 1)) * 4).astype(np.float32)
        for path in [*paths] + ["xla"] * (M in (7, 64) and block == m) + [""] * (M == 64):
            y = np.asarray(cpu.matmul(jnp.asarray(x), weights, path=path))
            assert y.dtype == np.float32 and np.all(np.abs(y - x @ matrix) <= bound(x, weights, 14.9, block)), (M, path)
        one = [np.asarray(cpu.matmul(jnp.asarray(x), weights, digits=1, path=path)) for path in paths]
        assert all(np.array_equal(y, one[0]) for y in one)
        assert np.all(np.abs(one[0] - x @ matrix) <= bound(x, weights, 7.9, block))


def test_one_digit_confines_an_outlier_to_its_block(paths):
    weights, matrix, rng = case(2560, 32)
    x = rng.standard_normal((2, 2560)).astype(np.float32)
    x[0, 100], x[1, 2555] = 1000, -300
    for digits, bits, block in ((1, 7.9, 1024), (2, 14.9, 2560)):
        found = [np.asarray(cpu.matmul(jnp.asarray(x), weights, digits=digits, path=path)) for path in paths]
        assert all(np.array_equal(y, found[0]) for y in found)
        assert np.all(np.abs(found[0] - x @ matrix) <= bound(x, weights, bits, block))


def test_unusual_rows(paths):
    """Zeros give zeros, powers of two lose nothing, NaN and infinity stay in their rows; dtypes are kept."""
    weights, matrix, rng = case(512, 20)
    x = 2.0 ** rng.integers(-6, 1, (5, 512)).astype(np.float32)
    x[:, 0] = 127 * 128 / 2**14  # the largest, of which steps are made
    x[1], x[2, 7], x[3, 9] = 0, np.nan, -np.inf
    for path in paths:
        y = np.asarray(cpu.matmul(jnp.asarray(x), weights, path=path))
        np.testing.assert_allclose(y[[0, 4]], x[[0, 4]] @ matrix, rtol=1e-6, atol=1e-6)
        assert np.all(y[1] == 0) and np.all(np.isnan(y[2:4]))
        tiny = cpu.matmul(jnp.asarray(x[:1] * np.float32(1e-35)), weights, path=path)
        assert np.all(np.abs(tiny) < 1e-27)
    half = jnp.asarray(x[:1], jnp.bfloat16)
    y = cpu.matmul(half, weights)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), half.astype(jnp.float32) @ matrix, rtol=2**-8, atol=1e-3)


def test_in_jit_and_scan_over_stacked_layers(paths):
    weights, matrices, rng = zip(*(case(512, 512, (1, 1), seed) for seed in range(3)))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    codes = jnp.stack([cpu.codes(w) for w in weights])
    together = cpu.convert(Packed(pack(codes), stack.scales, 512, 512))
    assert np.array_equal(together.data, stack.data) and np.array_equal(cpu.codes(stack), codes)
    x = rng[0].standard_normal((2, 512)).astype(np.float32)
    y, each = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (cpu.matmul(x, w) / 16,) * 2, x, w))(x, stack)
    for k, matrix in enumerate(matrices):
        before = x if k == 0 else np.asarray(each[k - 1])
        np.testing.assert_allclose(each[k], before @ matrix / 16, atol=2e-3)
    assert np.array_equal(y, each[-1])


def test_eight_devices_at_once(paths):
    """Each has its outputs; all hand work to the same threads, and none waits for another."""
    weights, matrix, rng = case(512, 1024, (1, 8))
    x = rng.standard_normal((3, 512)).astype(np.float32)

    def local(x, data, scales):
        w = Packed(data, scales, 512, 128, cpu.LAYOUT)
        for _ in range(20):
            y = cpu.matmul(x, w)
            x = x + 0 * y[:, :1]
        return y

    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P("model"), P(None, "model"))
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(None, "model")))
    y = np.asarray(run(jnp.asarray(x), weights.data, weights.scales))
    assert np.all(np.abs(y - x @ matrix) <= bound(x, weights, 14.9, 512))


@pytest.mark.parametrize("scales", [(1, 1), (2, 1), (1, 5), (2, 60)])
def test_gradient(paths, scales):
    weights, matrix, rng = case(512, 60, scales)
    x, g = (rng.standard_normal((2, 3, k)).astype(np.float32) for k in (512, 60))
    y, back = jax.vjp(lambda x: api.ternary_matmul(x, weights), jnp.asarray(x))
    rows = x.reshape(6, 512)
    close = bound(rows, weights, 14.9, 256 if scales == (2, 60) else 512)
    assert np.all(np.abs(y.reshape(6, 60) - rows @ matrix) <= close)
    np.testing.assert_allclose(back(jnp.asarray(g))[0], g @ matrix.T, rtol=1e-5, atol=1e-4)


def test_a_read_reads_everything(paths):
    data = np.random.default_rng(0).integers(0, 256, 256 * 1001, np.uint8)
    words = np.bitwise_xor.reduce(data.view(np.uint32))
    assert int(cpu.read(jnp.asarray(data))[0]) == words


def test_what_it_refuses(paths):
    x = jax.ShapeDtypeStruct((1, 600), jnp.float32)
    packed = Packed(jnp.zeros((150, 8), jnp.uint8), jnp.ones((3, 8)), 600, 8)
    assert "groups of 200 inputs: groups are whole multiples of 256" in cpu.refuses(x, packed)
    packed = Packed(jnp.zeros((2, 150, 8), jnp.uint8), jnp.ones((2, 1, 1)), 600, 8)
    assert "a stack, (2, 150, 8): it takes one layer's" in cpu.refuses(x, packed)
    packed = Packed(jnp.zeros((1 << 15, 1), jnp.uint8), jnp.ones((1, 1)), 1 << 17, 1)
    assert "131072 inputs share a step" in cpu.refuses(jax.ShapeDtypeStruct((1, 1 << 17), jnp.float32), packed)


@pytest.mark.parametrize(
    "x, data, scales, n, digits, path, message",
    [
        ((1, 512), (1, 256), (1, 1), 4, 2, "", r"x \(1, 512\), matrix \(1, 256\)"),
        ((1, 512), (2, 512), (1, 1), 4, 2, "", r"y \(1, 4\)"),
        ((512,), (1, 512), (1, 1), 4, 2, "", "have two dims"),
        ((1, 512), (1, 512), (1, 3), 4, 2, "", "do not divide"),
        ((1, 512), (1, 512), (0, 1), 4, 2, "", "do not divide"),
        ((1, 0), (1, 0), (1, 1), 4, 2, "", "do not divide"),
        ((1, 512), (1, 512), (4, 2), 4, 2, "", "not whole spans"),
        ((1, 512), (1, 512), (1, 1), 4, 3, "", "digits are 1 or 2: 3"),
        ((1, 512), (1, 512), (1, 1), 4, 2, "sse2", "no path 'sse2'"),
        ((1, 1 << 17), (1, 1 << 17), (1, 1), 4, 2, "", "over 65536 inputs"),
    ],
)
def test_misfits_in_the_kernel_are_errors(paths, x, data, scales, n, digits, path, message):
    call = partial(jax.ffi.ffi_call("spectra_ternary", jax.ShapeDtypeStruct((1, n), jnp.float32)),
                   digits=np.int64(digits), path=path)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(jnp.ones(x), jnp.zeros(data, jnp.uint8), jnp.ones(scales)))


def test_nothing_to_compute(paths):
    weights, *_ = case(256, 4)
    assert cpu.matmul(jnp.ones((0, 256)), weights).shape == (0, 4)


def in_process(code, **env):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_compiler_the_reason_is_given_and_the_rest_works(tmp_path):
    code = """
import jax, jax.numpy as jnp
from pallas_kernels import api, cpu
from pallas_kernels.packing import Packed, pack
api.IMPLEMENTATIONS["cpu"] = cpu
packed = Packed(pack(jnp.ones((8, 4), jnp.int8)), jnp.ones((1, 1)), 8, 4)
print(cpu.refuses(jax.ShapeDtypeStruct((1, 8), jnp.float32), packed))
print(float(api.ternary_matmul(jnp.ones((1, 8)), packed)[0, 0]))
try:
    api.ternary_matmul(jnp.ones((1, 8)), packed, implementation="cpu")
except ValueError as e:
    print(e)
"""
    empty = dict(PATH="", CXX="", XDG_CACHE_HOME=str(tmp_path))
    reason, y, refusal = in_process(code, **empty).strip().split("\n")
    assert reason == "there is no C++ compiler: install g++ or clang++, or set CXX" and y == "8.0"
    assert refusal == f"'cpu' cannot serve (1, 8) x (8, 4): {reason}"
    assert not list(tmp_path.iterdir())
    assert in_process(code, SPECTRA_NO_COMPILE="1").startswith("SPECTRA_NO_COMPILE is set\n8.0\n")


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo note >&2; echo 'error: no such thing' >&2; exit 1; }")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(build.Unavailable, match="c\\+\\+ failed: error: no such thing$"):
        build.library()
    assert not list((tmp_path / "cache/spectra_jax").iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.Unavailable, match="cannot be kept"):
        build.library()


def test_processes_that_build_at_once(paths, tmp_path):
    command = [sys.executable, "-m", "pallas_kernels.build"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    (library,) = (tmp_path / "spectra_jax").iterdir()  # one file and nothing half done
    assert said == [f"{library}\npath: {paths[0]}\n"] * 2
