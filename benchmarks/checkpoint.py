"""What checksums cost when a state is saved and restored, against Orbax alone, and the memory that a restore takes.

    python benchmarks/checkpoint.py [--mib=384] [--rounds=5]

The state has the form of a run's: stacked matrices, an embedding, a head, and both moments of Adam. Each round saves
and restores it with Orbax's own calls and with ours, one after the other in one process, on the CPU. Ratios are
medians over the rounds, with the smallest and largest in brackets; the last line of the output is JSON.

Of a save, two times count: what the training thread waits until it may go on, and the whole until the checkpoint has
its name. On a CPU the checksums run on the cores that the file system needs; an accelerator reads its memory for them
at hundreds of gigabytes per second, while the save itself takes as long as the disk.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from spectra_jax.checkpoint import Checkpoints
from spectra_jax.schema import Checkpoint, Config, Train
from spectra_jax.stored import abstract

CONFIG = Config(train=Train(steps=100), checkpoint=Checkpoint(every_steps=1, keep=1, read_back=False))


def make_state(mib: int) -> dict:
    """Float32 arrays of that size altogether, a third of it parameters."""
    D = 1024
    rows = mib * 2**20 // 4 // 3 // D // 8

    def draw(seed: int) -> dict:
        shapes = {"up": (4, rows // 4 * 3, D), "down": (4, D, rows // 4 * 3), "embedding": (rows, D), "head": (rows, D)}
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}

    return {"step": jnp.int32(7), "parameters": draw(0), "optimizer": {"mu": draw(1), "nu": draw(2)}}


def make_like(mib: int) -> dict:
    """What a restore of it is told."""
    mesh = jax.make_mesh((1, 1, 1), ("slice", "data", "model"))
    return abstract(jax.eval_shape(partial(make_state, mib)), mesh)


def size(state: dict) -> int:
    """Bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def seconds(call) -> tuple[float, object]:
    """Wall time, and what the call gave."""
    began = time.perf_counter()
    found = jax.block_until_ready(call())
    return time.perf_counter() - began, found


def one_round(folder: Path, state: dict, like: dict) -> dict[str, float]:
    """Times of Orbax and of ours."""
    trees = {"parameters": state["parameters"], "training": {k: v for k, v in state.items() if k != "parameters"}}
    wanted = {"parameters": like["parameters"], "training": {k: v for k, v in like.items() if k != "parameters"}}
    times = {}
    with ocp.training.Checkpointer(folder / "plain") as plain:
        times["plain thread"], saving = seconds(lambda: plain.save_checkpointables_async(1, trees))
        times["plain save"] = times["plain thread"] + seconds(saving.result)[0]
        times["plain restore"], _ = seconds(lambda: plain.load_checkpointables(1, wanted))
    ours = Checkpoints(folder / "ours", CONFIG)
    times["our thread"], _ = seconds(lambda: ours.save(1, state, {}))
    times["our save"] = times["our thread"] + seconds(ours.wait)[0]
    times["our restore"], _ = seconds(lambda: ours.restore(1, like))
    ours.close()
    for name in ("plain", "ours"):
        shutil.rmtree(folder / name)
    return times


def peak_of_a_restore(workdir: str, mib: int) -> int:
    """Bytes by which a restore raises the peak of resident memory; to be run in a fresh process."""
    like, status = make_like(mib), Path("/proc/self/status")

    def peak() -> int:
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak()
    jax.block_until_ready(Checkpoints(workdir).restore(1, like))
    return peak() - before


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=384, help="size of the state (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    args = parser.parse_args()
    state, like = make_state(args.mib), make_like(args.mib)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(state)) / size(state)
    with tempfile.TemporaryDirectory() as folder:
        one_round(Path(folder), state, like)  # compiles, and fills caches
        rounds = [one_round(Path(folder), state, like) for _ in range(args.rounds)]
        ours = Checkpoints(folder, CONFIG)
        ours.save(1, state, {})
        ours.close()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_of_a_restore, (folder, args.mib)) / size(state)
    found = {"mib": args.mib, "peak / state": round(peak, 3), "largest array / state": round(largest, 3)}
    for name in ("thread", "save", "restore"):
        ratios = [times[f"our {name}"] / times[f"plain {name}"] for times in rounds]
        found[name] = [round(x, 3) for x in (statistics.median(ratios), min(ratios), max(ratios))]
        print(f"{name:>8}: ours / Orbax alone {found[name][0]:.2f} ({found[name][1]:.2f}-{found[name][2]:.2f})")
    print(f"a restore raises the peak memory by {peak:.2f} of the state; its largest array is {largest:.2f} of it")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
