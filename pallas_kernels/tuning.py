"""TPU generations as the kernel sees them, and the blocks of a matrix that it loads at a time."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import jax.numpy as jnp
from jax.typing import DTypeLike

TILE = 128  # codes and outputs are padded to it: the lanes of a register, and the inputs in one register of codes
ROWS = 8  # activations are padded to it: the sublanes of a register
DIGITS = 2  # of an activation, at most; each is a row of the product


@dataclass(frozen=True)
class Generation:
    """One TensorCore. The clock is assumed: nobody publishes it; a slower one predicts less.

    `weights` and `activations` are what its matrix unit (MXU) takes. `loads` and `products` are weights and products a
    cycle: the first from the bundles of the compiled kernel, the second from the published peak and the clock.
    """

    kinds: tuple[str, ...]  # jax's `device_kind`
    cores: int  # of a jax device; the kernel's outputs are divided among them
    vmem: int  # bytes
    bandwidth: float  # of HBM, bytes a second
    clock: float  # Hz, assumed
    weights: DTypeLike
    activations: DTypeLike
    loads: int
    products: int


# Memory, bandwidth and peaks of the chips: Cloud TPU documentation, halved where a chip has two cores (v4, v5p, v7x).
# VMEM: as `pltpu.get_tpu_info_for_chip` says. v4 and v7x have no int8 MXU; that of v7x multiplies bf16 by fp8.
GENERATIONS = {
    "v4": Generation(("TPU v4",), 2, 16 << 20, 1228e9 / 2, 1.05e9, jnp.bfloat16, jnp.bfloat16, 1400, 1 << 16),
    "v5e": Generation(("TPU v5 lite", "TPU v5e"), 1, 128 << 20, 819e9, 1.5e9, jnp.int8, jnp.int8, 4096, 1 << 17),
    "v5p": Generation(("TPU v5", "TPU v5p"), 2, 64 << 20, 2765e9 / 2, 1.75e9, jnp.int8, jnp.int8, 4096, 1 << 17),
    "v6e": Generation(("TPU v6 lite", "TPU v6e"), 1, 128 << 20, 1640e9, 1.75e9, jnp.int8, jnp.int8, 4096, 1 << 19),
    "v7x": Generation(("TPU7x",), 1, 64 << 20, 7380e9 / 2, 1.9e9, jnp.float8_e4m3fn, jnp.bfloat16, 4096, 1 << 18),
}
# Cycles of a step in which the MXU takes no weights, as the compiled loop of v5e has them: the loop's own, filling and
# draining; where the inputs are divided, more, and per register of sums a load, an addition and a store.
OVERHEAD, DIVIDED, PER_REGISTER = 150, 80, 4
REGISTER = 1024  # numbers of 32 bits


def vmem_bytes(bm: int, bk: int, bn: int, generation: str) -> int:
    """VMEM that a step takes, with two digits an activation and float32 results. What the pipeline moves counts twice.

        2 (2 bm bk x + bk bn / 4 + 4 bm 128 + 4 8 bn + 4 bm bn) + bk bn w + 2 4 (2 bm bn) + 1 MiB

    Activations of x bytes, packed weights, a step per row (a register wide), a scale per column (a register high),
    results; weights of w bytes as the MXU takes them; the sums and one product to add to them; the compiler's own. It
    is an upper bound, and the limit that the kernel is compiled under: most widened weights never leave registers.
    """
    core = GENERATIONS[generation]
    x, w = jnp.dtype(core.activations).itemsize, jnp.dtype(core.weights).itemsize
    moved = DIGITS * bm * bk * x + bk * bn // 4 + 4 * bm * TILE + 4 * ROWS * bn + 4 * bm * bn
    return 2 * moved + bk * bn * w + 2 * 4 * DIGITS * bm * bn + (1 << 20)


def seconds(M: int, m: int, n: int, blocks: tuple[int, int, int], generation: str) -> float:
    """Predicted time of the product, from which blocks are chosen: the first load, then the slower of load and compute.

    A model, not a measurement: `aot.py` counts the cycles of the compiled loop.
    """
    core, (bm, bk, bn) = GENERATIONS[generation], blocks
    rows = DIGITS * bm
    steps = -(-(-(-M // bm) * (n // bn)) // core.cores) * (m // bk)
    cycles = OVERHEAD + bk * bn * max(1 / core.loads, rows / core.products)
    if bk < m:
        cycles += DIVIDED + PER_REGISTER * rows * bn / REGISTER
    x = rows * bk * jnp.dtype(core.activations).itemsize
    load = (bk * bn / 4 + (x if bk < m else x * bn / n)) / core.bandwidth  # all inputs at once: they stay for all n
    return (x + bk * bn / 4) / core.bandwidth + steps * max(cycles / core.clock, load)


@lru_cache(maxsize=None)
def blocks(M: int, m: int, n: int, generation: str) -> tuple[int, int, int]:
    """Blocks (bm, bk, bn) of rows, inputs and outputs, the fastest by `seconds` that fit in half the VMEM.

    Half, because XLA keeps what the next operations read in the rest. Up to 256 rows are one block.

    Args:
      m, n: of the matrix as stored, so multiples of 128; bk and bn divide them.

    Raises:
      ValueError: an m or n that is no multiple of 128, or an unknown generation.
    """
    if generation not in GENERATIONS:
        raise ValueError(f"there is no TPU generation {generation!r}; there are {', '.join(GENERATIONS)}")
    if m % TILE or n % TILE:
        raise ValueError(f"a stored matrix has dims that are multiples of {TILE}, not {(m, n)}: use tpu.convert")
    tall = [-(-M // ROWS) * ROWS] if M <= 256 else [128, 256, 512]
    fitting = [
        sides
        for sides in product(tall, _divisors(m), _divisors(n))
        if vmem_bytes(*sides, generation) <= GENERATIONS[generation].vmem // 2
    ]
    return min(fitting, key=lambda sides: (seconds(M, m, n, sides, generation), -sides[1]))


def _divisors(size: int) -> list[int]:
    tiles = size // TILE
    return [TILE * k for k in range(1, tiles + 1) if tiles % k == 0]
