"""Kills training at random moments, again and again, and compares what comes out with a run that was left alone.

    python benchmarks/faults.py [--kills=200] [--seed=0] [--steps=400]

A TriLM of two small layers with both interventions, two microbatches, a save every 10 steps and several epochs is
trained by `python -m spectra_jax.train`. One run is left alone. Others are killed with SIGKILL at moments drawn over
the whole life of a process (start, compilation, steps, saves) and started again by the same command until they end;
then every loss and the checksum of every array of the last checkpoint must be those of the first run. The exit
status is 1 where a run differs. The last line of the output is JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from spectra_jax import metrics
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data.prepare import prepare
from spectra_jax.stored import record_of

ROOT = Path(__file__).parents[1]
WORDS = "the whale said of ocean and a captain never slept while seven lamps burned".split()
# Small, so that a life is short; the prepared set is small enough for the run to pass the end of an epoch.
OVERRIDES = (
    "model.V=304", "model.D=32", "model.F=64", "model.L=2", "model.N=4", "model.K=2", "model.H=8", "model.unroll=1",
    "model.attention_blocks=2", "data.T=16", "data.batch=4", "train.accumulate=2", "train.loss_chunks=2",
    "checkpoint.every_steps=10", "checkpoint.permanent_tokens=5000", "evaluate.every_steps=100", "evaluate.batches=1",
    "metrics.every_steps=1", "metrics.weights_every_steps=0",
)


def prepared(folder: Path, seed: int) -> Path:
    """A small set of random sentences."""
    draw, source = random.Random(seed), folder / "texts.jsonl"
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(300)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(
        [str(source)], folder / "data", tokenizer="train:300", T=16, licence="CC0", validation_percent=10.0,
        workers=1, progress=False,
    )
    return folder / "data"


def start(workdir: Path, data: Path, steps: int) -> subprocess.Popen:
    """A training process, with a cache of compiled programs so that many lives fit into an hour."""
    command = [
        sys.executable, "-m", "spectra_jax.train", "--config=configs/quickstart.py:TriLM", f"--workdir={workdir}",
        *(f"--config.{text}" for text in (*OVERRIDES, f"data.sets={data}", f"train.steps={steps}")),
    ]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(data.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def result(workdir: Path, steps: int) -> tuple[dict[int, float], dict]:
    """Every training loss by its step, and the checksums of the last checkpoint."""
    losses = [(r["step"], r["loss"]) for r in metrics.read(workdir) if r["kind"] == "train"]
    if [step for step, _ in losses] != list(range(1, steps + 1)):
        raise SystemExit(f"{workdir}: steps are missing or there twice")
    return dict(losses), record_of(Checkpoints(workdir).path(steps))["arrays"]


def last_step(workdir: Path) -> int:
    """The newest step on record."""
    if not (workdir / metrics.FILE).exists():
        return 0
    return max((r["step"] for r in metrics.read(workdir) if r["kind"] == "train"), default=0)


def live(workdir: Path, data: Path, steps: int, seconds: float) -> bool:
    """Runs for `seconds` at most; whether it was killed. A process that ends by itself must end well."""
    process = start(workdir, data, steps)
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    if process.returncode:
        raise SystemExit(f"{workdir}: exit status {process.returncode}\n{stderr[-2000:]}")
    return False


def main() -> int:
    """Runs the benchmark; the exit status is 1 where a run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (default %(default)s)")
    args = parser.parse_args()
    draw, kills, before_steps, different, runs = random.Random(args.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = prepared(folder, args.seed)
        live(folder / "warm", data, args.steps, 600.0)  # fills the cache of compiled programs
        began = time.monotonic()
        live(folder / "straight", data, args.steps, 600.0)
        whole, expected = time.monotonic() - began, result(folder / "straight", args.steps)
        while kills < args.kills:
            workdir, runs, deaths = folder / f"run{runs}", runs + 1, []
            while True:
                left = args.kills - kills - len(deaths)
                step = last_step(workdir)
                if not live(workdir, data, args.steps, draw.uniform(0, whole) if left else 600.0):
                    break
                deaths.append(last_step(workdir))
                before_steps += deaths[-1] <= step
            kills += len(deaths)
            bits = "same" if result(workdir, args.steps) == expected else "OTHER"
            different += bits == "OTHER"
            print(f"run {runs}: {len(deaths)} kills, at steps {deaths}: {bits} bits", flush=True)
    print(json.dumps({
        "seed": args.seed, "steps": args.steps, "kills": kills, "before_a_new_step": before_steps, "runs": runs,
        "different": different,
    }))
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
