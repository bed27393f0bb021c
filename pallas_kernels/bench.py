"""Packed products on this device: right against float64, then their speed: python -m pallas_kernels.bench [--quick]

Models are `--shapes=3.9b,8b,70b`, implementations by default all that serve here. For every layer shape and number of
rows: microseconds, GB/s of packed weights (m n / 4 bytes), their fraction of a device copy timed in the same run (bytes
read and written, in place), and how many times faster than the dense product, in bfloat16 (float32 on a CPU). `--sweep`
times the GPU kernel's other blocks beside the one it chooses. The last line of the output is JSON.

Dispatch is hidden and caches are cold: one jitted loop goes through many matrices, larger together than any cache, and
a barrier makes every product wait for the one before. Times are medians over `--rounds`. Errors are relative norms over
up to 512 outputs; one above its bound makes the exit status 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import api, gpu
from pallas_kernels.packing import Packed, pack

# Matrices (inputs, outputs) of one block: q and o; k and v where they are fewer; gate and up; down.
MODELS = {
    "3.9b": ((3072, 3072), (3072, 9216), (9216, 3072)),  # TriLM
    "8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),  # Llama 3
    "70b": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "quick": ((512, 1280),),
}
ROWS = (1, 4, 8, 16, 32, 64, 128, 512)
CACHE = 256 << 20  # bytes that no cache here holds: what the matrices of a loop take together, at least
MOST = 128  # of them; at 1 MiB each they are still twice an H200's L2
BOUND = {"bfloat16": 3e-3, "float32": 2e-4}  # of relative errors: the output's rounding, the digits of x


@dataclass(frozen=True)
class Contender:
    """A way to compute a product: `prepare` makes its matrix of the packed one, `product` takes x and that."""

    name: str
    prepare: Callable[[Packed], Packed | jax.Array]
    product: Callable[[jax.Array, Packed | jax.Array], jax.Array]


def dense(dtype: DTypeLike) -> Contender:
    """The same matrix in `dtype`, by XLA."""
    return Contender(
        "dense", lambda w: w.dequantize().astype(dtype), partial(jnp.dot, preferred_element_type=jnp.dtype(dtype))
    )


def packed(name: str) -> Contender:
    """An implementation of `api`."""
    return Contender(
        name, partial(api.prepare, implementation=name), partial(api.ternary_matmul, implementation=name)
    )


def sweep(M: int, m: int, n: int) -> list[Contender]:
    """The GPU kernel with other blocks than it would choose, each different in one thing."""
    chosen = gpu.choose(M, m, n)
    changes = {
        "fewer splits": {"splits": max(1, chosen.splits // 2)},
        "more splits": {"splits": min(-(-m // gpu.INPUTS), 2 * chosen.splits)},
        "more outputs": {"bn": 2 * chosen.bn},
        "more, 8 warps": {"bn": 2 * chosen.bn, "warps": 8},
        "8 warps": {"warps": 8},
        "turned": {"weights_first": not chosen.weights_first},
        "2 stages": {"stages": 2},
        "6 stages": {"stages": 6},
        "fewer rows": {"bm": max(8, chosen.bm // 2), "weights_first": chosen.bm > 16},
        "more rows": {"bm": min(2 * chosen.bm, max(8, pl.next_power_of_2(M))), "warps": 8, "stages": 2},
    }
    blocks = {name: replace(chosen, **change) for name, change in changes.items()}
    found = {name: block for name, block in blocks.items() if fits(block, n) and block != chosen}
    if M > gpu.CROSSOVER:
        found["kernel"] = chosen
    return [Contender(f"gpu, {name}", gpu.convert, partial(gpu.matmul, block=block)) for name, block in found.items()]


def fits(block: gpu.Block, n: int) -> bool:
    """Whether a Hopper multiprocessor has room for the block, and n outputs divide into it."""
    return n % block.bn == 0 and block.accumulators <= 128 and block.shared_bytes <= 227 << 10


def draw(seed: int, m: int, n: int) -> Packed:
    """Random codes and one scale, so that outputs are about as large as inputs."""
    codes = jax.random.randint(jax.random.key(seed), (m, n), -1, 2, jnp.int8)
    return Packed(pack(codes), jnp.full((1, 1), m**-0.5, jnp.float32), m, n)


def error(contender: Contender, x: jax.Array, weights: Packed) -> float:
    """Relative norm of the error against float64 on up to 512 outputs; NaN anywhere makes it NaN."""
    y = np.asarray(jax.jit(contender.product)(x, contender.prepare(weights)), np.float64)
    columns = np.arange(0, weights.n, -(-weights.n // 512)) + np.random.default_rng(0).integers(-(-weights.n // 512))
    columns = columns[columns < weights.n]
    scale = float(weights.scales[0, 0])
    expected = np.asarray(x, np.float64) @ np.asarray(weights.codes()[:, columns], np.float64) * scale
    return float(np.linalg.norm(y[:, columns] - expected) / np.linalg.norm(expected) + 0 * y.sum())


def seconds(contender: Contender, x: jax.Array, matrices: Sequence, products: int, least: float, rounds: int) -> float:
    """Seconds that one product takes: the median over rounds that last about `least`.

    One program computes about `products` of them, so many that starting it is hidden behind the one before.
    """
    turns = max(1, products // len(matrices))
    n = jax.eval_shape(contender.product, x, matrices[0]).shape[1]

    @jax.jit
    def program(x, matrices):
        def turn(_, outputs):
            for i, matrix in enumerate(matrices):
                # Not arithmetic, which would be a launch of its own; without, what does not change leaves the loop.
                turned, matrix, _ = jax.lax.optimization_barrier((x, matrix, outputs[i - 1]))
                outputs[i] = contender.product(turned, matrix)
            return outputs

        return jax.lax.fori_loop(0, turns, turn, [jnp.zeros((x.shape[0], n), x.dtype)] * len(matrices))

    def run(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            outputs = program(x, matrices)
        jax.block_until_ready(outputs)
        return time.perf_counter() - began

    run(2)  # compiles, and records the GPU's graphs
    calls = max(1, round(least / run(1)))
    return statistics.median(run(calls) for _ in range(rounds)) / calls / turns / len(matrices)


def copy_bandwidth(size: int, rounds: int) -> float:
    """Bytes a second, read and written, of passes over `size` bytes that write what they read, negated.

    In place, in one program: a copy into new memory would time its allocation too, on a CPU most of all.
    """
    turns = 8
    negate = jax.jit(lambda a: jax.lax.fori_loop(0, turns, lambda _, a: -a, a), donate_argnums=0)
    array = jax.block_until_ready(negate(jnp.ones(size // 4, jnp.float32)))
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        array = jax.block_until_ready(negate(array))
        times.append((time.perf_counter() - began) / turns)
    return 2 * size / statistics.median(times)


def measure(m: int, n: int, args: argparse.Namespace, bandwidth: float) -> list[dict]:
    """A row of the table for every number of rows and contender, printed as it comes."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    first = draw(0, m, n)
    found = []
    stacks = {}  # matrices by how they are prepared: contenders share them
    for M in args.rows:
        x = jax.random.normal(jax.random.key(M), (M, m), dtype)
        contenders = [dense(dtype), *(packed(name) for name in served(args.implementations, x, first))]
        contenders += sweep(M, m, n) if args.sweep else []
        time_of_dense = None
        for contender in contenders:
            kind = "gpu" if contender.name.startswith("gpu") else contender.name
            size = m * n * jnp.dtype(dtype).itemsize if kind == "dense" else m * n // 4
            if kind not in stacks:
                copies = min(MOST, max(2, -(-args.bytes // size)))
                prepare = jax.jit(contender.prepare)
                stacks[kind] = [prepare(draw(seed, m, n)) for seed in range(copies)]
            wrong = error(contender, x, first)
            took = seconds(contender, x, stacks[kind], args.products, args.least, args.rounds)
            time_of_dense = time_of_dense or took
            row = {
                "m": m, "n": n, "M": M, "name": contender.name, "microseconds": took * 1e6,
                "GB/s": size / took / 1e9, "of copy": size / took / bandwidth, "of dense": time_of_dense / took,
                "error": wrong, "right": wrong <= BOUND[jnp.dtype(dtype).name],
            }
            found.append(row)
            print(
                f"{m:>6} x {n:<6} {M:>4} {contender.name:<18} {row['microseconds']:>10.2f} {row['GB/s']:>9.1f}"
                f" {row['of copy']:>8.1%} {row['of dense']:>7.2f} {wrong:>9.1e}{'' if row['right'] else '  WRONG'}",
                flush=True,
            )
    return found


def served(names: Sequence[str], x: jax.Array, weights: Packed) -> list[str]:
    """Those of the implementations, by default of all, that serve here."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return [name for name in names or api.IMPLEMENTATIONS if api.IMPLEMENTATIONS[name].refuses(shape, weights) is None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=_list, default=list(MODELS)[:3], help="of 3.9b, 8b, 70b")
    parser.add_argument("--implementations", type=_list, default=[], help="by default those that serve here")
    parser.add_argument("--rows", type=lambda text: [int(M) for M in _list(text)], default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="the GPU kernel's other blocks too")
    parser.add_argument("--quick", action="store_true", help="one small matrix, 1 and 8 rows")
    args = parser.parse_args(argv)
    for given, known in ((args.shapes, MODELS), (args.implementations, api.IMPLEMENTATIONS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"there is no {unknown[0]!r}; there are {', '.join(known)}")
    if args.sweep and (reason := gpu.refuses(jax.ShapeDtypeStruct((1, 512), jnp.bfloat16), draw(0, 512, 128))):
        parser.error(f"--sweep times the GPU kernel: {reason}")
    on_cpu = jax.default_backend() == "cpu"
    args.products, args.least, args.bytes, copied = 8 if on_cpu else 256, 0.02, CACHE, 1 << (28 if on_cpu else 30)
    if args.quick:
        args.shapes, args.rows, args.rounds = ["quick"], [1, 8], 2
        args.least, args.bytes, copied = 0.0, 1 << 20, 1 << 24
    bandwidth = copy_bandwidth(copied, args.rounds)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, copy {bandwidth / 1e9:.1f} GB/s read and written")
    print("inputs x outputs  rows name               microseconds      GB/s  of copy of dense     error")
    shapes = dict.fromkeys(shape for name in args.shapes for shape in MODELS[name])
    found = [row for m, n in shapes for row in measure(m, n, args, bandwidth)]
    print(json.dumps({"device": device, "jax": jax.__version__, "copy GB/s": bandwidth / 1e9, "rows": found}))
    return 0 if all(row["right"] for row in found) else 1


def _list(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
