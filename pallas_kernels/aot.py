"""The TPU kernel compiled on any machine for a named TPU, and what its loop costs there: python -m pallas_kernels.aot

Needs libtpu (`pip install "jax[tpu]"`), no TPU. The compiler's own listing of the kernel, one line per bundle of
instructions that issue together, gives the cycles of a loop step: the bundles inside the loop. With blocks (bk, bn) a
step takes the longest of

    cycles / clock      bk bn / 4 / bandwidth      digits M bk bn / (products a cycle) / clock

and bf16 weights at the HBM limit 2 bk bn / bandwidth: their ratio is the prediction, 8 at most. What it leaves out:
stalls of DMAs, back-pressure of the MXU beyond the third term, the first load, which nothing hides, and what starting
a kernel costs; branches are counted as if all were taken. Clocks are assumed (`tuning.GENERATIONS`). No TPU was timed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from pallas_kernels import tpu
from pallas_kernels.packing import Packed
from pallas_kernels.tuning import GENERATIONS, TILE

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
SIDE, BLOCKS = 4096, (4096, 512)  # of the matrix whose loop is counted: 8 steps, all inputs in each
BATCHES = (8, 16, 32, 64, 128)


def devices(generation: str) -> list[jax.Device]:
    """The devices of a host of TPUs of this generation that is not there, to compile for.

    Raises:
      ImportError: libtpu is not installed.
    """
    if find_spec("libtpu") is None:
        raise ImportError('compiling for a TPU takes libtpu, which is not installed: pip install "jax[tpu]"')
    # libtpu asks the cloud what machine this is, for minutes where there is none, and locks out a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices


def compiled(
    generation: str,
    M: int,
    m: int,
    n: int,
    dtype: DTypeLike = jnp.bfloat16,
    scales: tuple[int, int] = (1, 1),
    **options,
) -> jax.stages.Compiled:
    """`tpu.matmul` of x (M, m) and a matrix (m, n) for one device of this generation; `options` are matmul's."""
    place = SingleDeviceSharding(devices(generation)[0])
    stored = (-(-m // TILE) * TILE // 16, -(-n // TILE) * TILE)
    data = jax.ShapeDtypeStruct(stored, jnp.int32, sharding=place)
    weights = Packed(data, jax.ShapeDtypeStruct(scales, jnp.float32, sharding=place), m, n, tpu.LAYOUT)
    x = jax.ShapeDtypeStruct((M, m), dtype, sharding=place)
    with tpu.target(generation):
        return jax.jit(partial(tpu.matmul, **options)).lower(x, weights).compile()


def loop_cycles(cases: list[tuple[str, int, int]]) -> list[int]:
    """Bundles in the kernel's loop for (generation, M, activation bits), blocks of 4096 inputs and 512 outputs.

    In a process of its own: libtpu reads where to write its listings when it is loaded, once.

    Raises:
      RuntimeError: that process failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, "-m", "pallas_kernels.aot", "--count", json.dumps(cases), "--folder", folder],
            env=os.environ | {"LIBTPU_INIT_ARGS": arguments.strip(), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"counting the cycles of {cases} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _count(cases: list[tuple[str, int, int]], folder: Path) -> list[int]:
    found = []
    for generation, M, bits in cases:
        compiled(generation, M, SIDE, SIDE, activation_bits=bits, blocks=(M, *BLOCKS))
        (listing,) = [
            path
            for path in folder.glob("*ternary_matmul*-final_bundles.txt")
            if "schedule-analysis" not in path.name
        ]
        # 0x1f   : > { ... }: the address, the depth of the loop in > signs, the instructions
        found.append(len(re.findall(r"^ *0x[0-9a-f]+ *\w* *: *>+ *\{", listing.read_text(), re.MULTILINE)))
        for path in folder.iterdir():  # some 20 MB
            path.unlink()
    return found


def predicted_ratio(generation: str, rows: int, cycles: int) -> float:
    """Speed against bf16 weights at the HBM limit of a loop step of so many cycles, `rows` of digits: see above."""
    core, (bk, bn) = GENERATIONS[generation], BLOCKS
    compute = max(cycles, rows * bk * bn / core.products) / core.clock
    return 2 * bk * bn / core.bandwidth / max(compute, bk * bn / 4 / core.bandwidth)


def main() -> None:
    """Print the table of predicted ratios, or count what `loop_cycles` asks for."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description=main.__doc__)
    parser.add_argument("generations", nargs="*", default=list(GENERATIONS), help=f"of {', '.join(GENERATIONS)}")
    parser.add_argument("--count", type=json.loads, help="cases, in JSON: for loop_cycles")
    parser.add_argument("--folder", type=Path, help="where libtpu writes its listings: for loop_cycles")
    given = parser.parse_args()
    if given.count:
        print(json.dumps(_count(given.count, given.folder)))
        return
    # Without an int8 MXU 8 bits are the same bf16 digit.
    kinds = [(name, bits) for name in given.generations for bits in _digits(name)]
    cases = [(name, M, bits) for name, bits in kinds for M in BATCHES]
    print(f"{SIDE} x {SIDE}, blocks {BLOCKS}, bf16 activations; predicted from static cycles, not timed")
    print(f"{'TPU':5}{'activations':>12}{'M':>5}{'cycles':>8}{'against bf16 weights':>22}")
    for (name, M, bits), cycles in zip(cases, loop_cycles(cases)):
        digits = _digits(name)[bits]
        kind = f"{digits} {jnp.dtype(GENERATIONS[name].activations).name}"
        print(f"{name:5}{kind:>12}{M:5}{cycles:8}{predicted_ratio(name, digits * M, cycles):21.1f}x")


def _digits(generation: str) -> dict[int, int]:
    """How many digits of bf16 activations the kernel multiplies, by the bits asked for."""
    return {16: 2, 8: 1} if GENERATIONS[generation].activations == jnp.int8 else {16: 1}


if __name__ == "__main__":
    main()
