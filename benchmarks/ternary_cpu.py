"""The CPU kernel at M = 1 against the bandwidth of memory.

    python benchmarks/ternary_cpu.py [--m=4096] [--n=4096] [--rounds=4] [--caches=2]

Matrices of 32 MiB together are multiplied one after the other in one program, x being the last one's output. The limit
is a read of a buffer of the same bytes in one call, by the same threads. Each has a stack of such parts, `--caches`
times the last-level cache together, and goes through it in order, so that nothing is in a cache when it is used. They
take turns; best of all, and quartiles of the ratio of neighbours in time, as other work on the machine disturbs both.
The last line of the output is JSON.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cpu
from pallas_kernels.packing import Packed

PART = 32 << 20  # bytes


def last_level_cache() -> int:
    """Bytes."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=256 << 20)


def chain(m: int, n: int, digits: int) -> Callable:
    """x through matrices (m, n), each written as (data, scales); x is cut or tiled between them where m is not n."""

    @jax.jit
    def run(x, matrices):
        for data, scales in matrices:
            y = cpu.matmul(x, Packed(data, scales, m, n, cpu.LAYOUT), digits=digits)
            x = jnp.tile(y, (1, -(-m // n)))[:, :m]
        return x

    return run


def measure(m: int, n: int, rounds: int, caches: float) -> dict[str, list[float]]:
    """Seconds for a part, each time, in order: "read", and 2 and 1 digits."""
    shape = (-(-n // cpu.OUTPUTS), -(-m // cpu.SPAN) * cpu.SPAN)
    each = max(1, PART // math.prod(shape))
    parts = math.ceil(caches * last_level_cache() / (each * math.prod(shape)))
    random = np.random.default_rng(0).integers(0, 3, (*shape, 4), np.uint8) @ np.array([1, 4, 16, 64], np.uint8)
    scales = jnp.full((1, 1), (2 / 3 * m) ** -0.5, jnp.float32)  # keeps the variance
    matrices = [[(jnp.array(random), scales) for _ in range(each)] for _ in range(parts)]
    buffers = [jnp.array(np.tile(random.reshape(-1), each)) for _ in range(parts)]
    x = jax.random.normal(jax.random.key(0), (1, m))
    read, two, one = jax.jit(cpu.read), chain(m, n, 2), chain(m, n, 1)
    runs = {
        "read": lambda i: read(buffers[i]),
        "2 digits": lambda i: two(x, matrices[i]),
        "1 digit": lambda i: one(x, matrices[(i + parts // 2) % parts]),
    }
    seconds = {name: [] for name in runs}
    for turn in range(parts * rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(turn % parts))
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}  # the first ones compile


def main() -> None:
    """Prints GB/s and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, default=4096)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--caches", type=float, default=2)
    args = parser.parse_args()
    seconds = measure(args.m, args.n, args.rounds, args.caches)
    shape = (-(-args.n // cpu.OUTPUTS), -(-args.m // cpu.SPAN) * cpu.SPAN)
    size = max(1, PART // math.prod(shape)) * math.prod(shape)
    print(f"{args.m} x {args.n}, path {cpu.paths()[0]}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    result = {}
    for name, times in seconds.items():
        ratio = np.array(seconds["read"]) / np.array(times)
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        best = min(seconds["read"]) / min(times)
        print(
            f"{name:8}  best {size / min(times) / 1e9:5.1f} GB/s, {best:.0%} of reading; neighbours in time: "
            f"median {middle:.0%}, quartiles {low:.0%} to {high:.0%} ({len(times)} parts)"
        )
        result[name] = dict(gbs=size / min(times) / 1e9, best=best, median=float(middle))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
