"""The GPU kernel without a GPU: its numbers in Pallas' interpreter, its lowering, and Triton's PTX of it."""

import contextlib
import platform
import re
import subprocess
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from pallas_kernels import gpu
from pallas_kernels.packing import Packed, pack

SIZES = [  # D, F of the nine TriLMs
    (512, 1280), (768, 2048), (1024, 2560), (1280, 3072), (1536, 4096),
    (1792, 5120), (2048, 6144), (2304, 7680), (3072, 9216),
]  # fmt: skip
LARGE = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672)]
BOUND = {"float32": 1.5e-4, "float16": 3e-4, "bfloat16": 3e-3}  # digits of x; rounding of y


def case(M, m, n, scales=(1, 1), dtype="float32", layout="2bit", seed=0):
    """x, weights in layout "gpu", their codes, and the product in float64."""
    rng = np.random.default_rng(seed)
    c = rng.integers(-1, 2, (m, n)).astype(np.int8)
    s = rng.uniform(0.5, 2, scales).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((M, m)), dtype)
    matrix = c * np.repeat(np.repeat(s.astype(np.float64), m // scales[0], 0), n // scales[1], 1)
    packed = Packed(pack(jnp.asarray(c), layout), jnp.asarray(s), m, n, layout)
    return x, gpu.convert(packed), c, np.asarray(x, np.float64) @ matrix


def check(y, expected, dtype):
    assert y.dtype == dtype
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) < BOUND[dtype] * np.linalg.norm(expected)


# Every size, its matrices one way or the other, ragged M, each kind of scale; in float32 the digits are all the error.
CASES = [
    (1, 512, 1280, (1, 1), "bfloat16"), (3, 768, 2048, (1, 1), "float32"), (8, 2560, 1024, (2, 1), "float32"),
    (17, 1280, 3072, (1, 3), "bfloat16"), (64, 1536, 4096, (1, 1), "float32"), (130, 1792, 5120, (1, 2), "bfloat16"),
    (1, 6144, 2048, (2, 1), "float32"), (3, 2304, 7680, (1, 7680), "float32"), (8, 3072, 9216, (6, 1), "bfloat16"),
    (17, 770, 300, (1, 300), "float16"),
]  # fmt: skip


@pytest.mark.parametrize("M, m, n, scales, dtype", CASES)
def test_product(M, m, n, scales, dtype):
    x, weights, _, expected = case(M, m, n, scales, dtype)
    check(gpu.matmul(x, weights, interpret=True), expected, dtype)


def test_blocks_do_not_change_the_product():
    """Sums of whole numbers: one split or many, outputs or rows first; uneven splits, and one that is empty."""
    x, weights, _, expected = case(17, 1792, 384)
    block = gpu.choose(17, 1792, 384)
    assert block.splits == 7 and block.weights_first
    found = [
        gpu.matmul(x, weights, block=replace(block, splits=splits, weights_first=first, bm=bm), interpret=True)
        for splits, first, bm in [(1, True, 32), (1, False, 8), (3, True, 8), (5, False, 32)]
    ]
    for y in found:
        check(y, expected, "float32")
    assert np.array_equal(*found[:2])


def test_many_rows_go_through_the_unpacked_matrix():
    x, weights, c, expected = case(gpu.CROSSOVER + 1, 300, 200, (1, 200))
    np.testing.assert_allclose(gpu.matmul(x, weights), expected, rtol=1e-5, atol=1e-4)  # no interpreter: no kernel
    x, weights, c, expected = case(gpu.CROSSOVER + 1, 300, 200, (3, 1), "bfloat16")
    check(gpu.matmul(x, weights), expected, "bfloat16")


@pytest.mark.parametrize("layout", ["2bit", "5trit"])
@pytest.mark.parametrize("shape", [(256, 128), (1, 1), (515, 130), (2, 3, 260, 128)])
def test_layout(shape, layout):
    """The codes come back, and byte c of output j in tile t holds inputs 256t + 4c up, the last on top."""
    c = np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)
    m, n = shape[-2:]
    weights = gpu.convert(Packed(pack(jnp.asarray(c), layout), jnp.ones((1, 1)), m, n, layout))
    assert weights.layout == gpu.LAYOUT and weights.data.shape == (*shape[:-2], -(-m // 256), -(-n // 128) * 128, 64)
    assert np.array_equal(gpu.codes(weights), c)
    data = np.asarray(weights.data)
    for k in {0, m // 2, m - 1}:
        bits = data[..., k // 256, :n, k % 256 // 4] >> (2 * (k % 4)) & 3
        assert np.array_equal(bits, c[..., k, :] & 3)


def test_digits():
    """To 2^-15 of a row's largest; a row of zeros; rows and inputs that are not there."""
    x = np.random.default_rng(0).standard_normal((11, 1030)).astype(np.float32) * 10
    x[3] = 0
    x[4, 7] = 4000
    q, step = gpu._digits(jnp.asarray(x), bm=8, tiles=5, interpret=True)
    q = np.asarray(q, np.float64).reshape(4, 2, 2, 8, -1)  # plane, block, digit, row, byte
    rows = (128 * q[:, :, 0] + q[:, :, 1]).transpose(1, 2, 3, 0)[..., ::-1].reshape(16, -1)
    found = (np.asarray(step, np.float64) * rows[:11])[:, :1280]
    assert np.all(np.abs(found[:, :1030] - x) <= np.abs(x).max(1, keepdims=True) / 2**14.98)
    assert np.all(found[:, 1030:] == 0) and np.all(found[3] == 0)


def test_assembly_decodes():
    """The instructions by their definition on random words, against the codes in them, times 64."""
    words = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    for p, assembly in enumerate(gpu.PLANES):
        registers = {"$1": words}
        for name, target, source, operand in re.findall(r"(\w+)\.b32 (\$\d), (\$\d), (\w+);", assembly):
            value = np.uint32(int(operand, 0))
            registers[target] = registers[source] << value if name == "shl" else registers[source] & value
            assert name in ("shl", "and")
        bits = (words.view(np.uint8).astype(int) >> (6 - 2 * p)) & 3
        expected = np.array([0, 64, -128, -64])[bits]  # 10 is no code
        assert np.array_equal(registers["$0"].view(np.int8), expected)
        plane = gpu._plane(jnp.asarray(words.view(np.uint8)), p, interpret=True)
        assert np.array_equal(plane, expected)


def test_refusals(monkeypatch):
    _, weights, *_ = case(1, 256, 128)
    x = jax.ShapeDtypeStruct((1, 256), jnp.float32)
    assert "needs an NVIDIA GPU, and the default device is cpu" in gpu.refuses(x, weights)

    class Device:
        platform, compute_capability = "gpu", "9.0"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device])  # what GPUs are refused cannot be tried without them
    assert gpu.refuses(x, weights) is None
    assert "scales (2, 128) of groups" in gpu.refuses(x, replace(weights, scales=jnp.ones((2, 128))))
    assert "float64" in gpu.refuses(jax.ShapeDtypeStruct((1, 256), np.float64), weights)
    Device.compute_capability = "7.5"
    assert "capability 8.0, and this GPU has 7.5" in gpu.refuses(x, weights)


# From here on for a GPU that is not there.


def lowered(M, m, n, block=None):
    """The program for an H200."""
    on_h200 = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # 0.10 takes one for granted
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
        on_h200 = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
    data = jax.ShapeDtypeStruct((-(-m // 256), -(-n // 128) * 128, 64), jnp.uint8)
    weights = Packed(data, jax.ShapeDtypeStruct((1, 1), jnp.float32), m, n, gpu.LAYOUT)
    x = jax.ShapeDtypeStruct((M, m), jnp.bfloat16)
    with on_h200:
        return jax.jit(partial(gpu.matmul, block=block)).trace(x, weights).lower(lowering_platforms=("cuda",))


def kernels(lowering):
    """Attributes of the Triton kernels in a lowered program, in order."""

    def walk(operation):
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    yield inner.operation
                    yield from walk(inner.operation)

    operations = walk(lowering.compiler_ir("stablehlo").operation)
    calls = [o.attributes for o in operations if o.name == "stablehlo.custom_call"]
    return [a["mhlo.backend_config"] for a in calls if a["call_target_name"].value == "__gpu$xla.gpu.triton"]


@pytest.mark.parametrize("m, n", [(D, D) for D, _ in SIZES] + SIZES + [(F, D) for D, F in SIZES] + LARGE)
def test_lowers(m, n):
    for M in (1, 16):
        digits, product = kernels(lowered(M, m, n))
        block = gpu.choose(M, m, n)
        assert [digits["grid_x"].value, digits["grid_y"].value] == [M, -(-m // gpu.SLICE)]
        grid = [product[f"grid_{axis}"].value for axis in "xyz"]
        assert grid == [1, n // block.bn, block.splits]
        # Every multiprocessor has work wherever there are steps enough to go round.
        assert grid[1] * grid[2] >= min(132, -(-m // 256) * n // 128)
    assert not kernels(lowered(gpu.CROSSOVER + 1, m, n))


def test_blocks_fit_every_gpu():
    for m, n in SIZES + LARGE:
        for M in (1, 3, 8, 16, 17, 32, 64, 128, 256):
            block = gpu.choose(M, m, n)
            assert block.shared_bytes <= 96 * 1024 and block.accumulators <= 128
            tiles = -(-m // 256)
            assert (block.splits - 1) * -(-tiles // block.splits) < tiles, "a split is empty"


triton_has_wheels = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton has wheels for Linux on x86-64 only"
)


def compiled(attributes, capability, folder):
    """PTX by Triton's compiler, the resources of the machine code that its ptxas makes of it, and shared memory."""
    import triton
    from triton._C.libtriton import ir as triton_ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    context = ir.Context()
    dialect.register_dialect(context)
    module = ir.Module.parse(attributes["ir"].value_bytes, context)
    path = folder / "kernel.ttir"
    path.write_text(module.operation.get_asm(enable_debug_info=False))
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": attributes["num_warps"].value, "num_stages": attributes["num_stages"].value}
    # Triton's own passes over its IR, which XLA runs too and `triton.compile` leaves out for a file.
    backend, context = make_backend(target), triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    module = triton_ir.parse_mlir_module(str(path), context)
    module.context = context
    path.write_text(str(backend.make_ttir(module, {}, backend.parse_options(options), capability)))
    kernel = triton.compile(str(path), target=target, options=options)
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return kernel.asm["ptx"], usage, kernel.metadata.shared


def loop(ptx):
    """How often each instruction stands in the longest loop."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\$L\w+:", line)}
    bodies = [
        lines[labels[target]:i]
        for i, line in enumerate(lines)
        if (jump := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)) and labels.get(target := jump[1], i) < i
    ]
    text = " ".join(re.sub(r"//.*", "", line) for line in max(bodies, key=len))
    return Counter(re.findall(r"(?:^|[;{}\s])((?:[a-z]\w*)(?:\.\w+)+)(?=\s)", text))


INTEGER = ("and", "or", "xor", "not", "shl", "shr", "shf", "add", "sub", "mul", "mad", "lop3", "prmt", "bfe", "bfi",
           "cvt", "selp", "min", "max")  # fmt: skip


@triton_has_wheels
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("M", [8, 1, 16, 64])
def test_ptx(M, capability, tmp_path, monkeypatch):
    """16-byte loads, 7/16 instructions a weight to decode and at most 0.75 in all, int8 tensor cores, no spills."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    m, n = 4096, 14336
    block = gpu.choose(M, m, n)
    _, product = kernels(lowered(M, m, n))
    ptx, usage, shared = compiled(product, capability, tmp_path)
    found = loop(ptx)
    weights = 256 * block.bn // (32 * block.warps)  # of a thread in a turn

    def count(*names):
        return sum(times for name, times in found.items() if name.split(".")[0] in names)

    assert count("and") == weights // 4 and count("shl") >= weights * 3 // 16
    assert count(*INTEGER) <= 0.75 * weights
    assert found["cp.async.cg.shared.global"] * 16 * 32 * block.warps >= 64 * block.bn
    assert count("ld") == count("st") == 0  # all through asynchronous copies and ldmatrix
    products = {name: times for name, times in found.items() if "mma" in name and ".s32.s8.s8" in name}
    assert products
    assert all(("wgmma" in name) == (block.weights_first and capability == 90) for name in products)
    assert shared <= block.shared_bytes
    assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] <= 255  # no spills
