"""What a training step of every system costs beside FloatLM's: time, floating-point operations, memory.

    python benchmarks/rivals.py [SWEEP.py] [--rounds=15] [--steps=4] [--config.SECTION.KEY=VALUE]

The sweep (by default configs/sweeps/rivals.py) must have been made: rows begin with other rows' weights, and are taught
by them. All steps are compiled in one process, then asked in turn, round after round, so that the noise of the machine
hits all alike; ratios are medians over the rounds of the ratio within a round, with the range of their middle half.
Operations and memory are XLA's: of the compiled program, and its arguments with its temporaries. The table is Markdown.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from contender import batch

from spectra_jax.schema import Config
from spectra_jax.sharding import batch_sharding, make_mesh
from spectra_jax.sweep import read_rows
from spectra_jax.train.start import first_state, teachers
from spectra_jax.train.step import make_step

SWEEP = str(Path(__file__).parents[1] / "configs" / "sweeps" / "rivals.py")


class Step:
    """One row's compiled step and its state."""

    def __init__(self, config: Config):
        self.config, self.mesh, self.done = config, make_mesh(config, jax.devices()[:1]), 0
        with jax.set_mesh(self.mesh):
            self.given = teachers(config, self.mesh)
            self.state = first_state(config, self.mesh, jax.random.key(config.seed))
            self.compiled = jax.jit(make_step(config), donate_argnums=0).lower(
                self.state, self.batch(), *self.given
            ).compile()
        memory = self.compiled.memory_analysis()
        self.bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.flops = self.compiled.cost_analysis()["flops"]

    def batch(self) -> jax.Array:
        """Drawn tokens, the same for every row."""
        return jax.device_put(batch(self.config, self.done), batch_sharding(self.mesh))

    def seconds(self, steps: int) -> float:
        """Per step."""
        tokens = self.batch()
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, tokens, *self.given)
        jax.block_until_ready(metrics)
        self.done += steps
        return (time.perf_counter() - began) / steps


def main() -> None:
    """Prints the table; the first row is what the others are compared with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?", default=SWEEP)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    args, overrides = parser.parse_known_args()
    rows = [row for row in read_rows(args.sweep, [text.removeprefix("--config.") for text in overrides]) if not row.of]
    steps = {row.name: Step(row.config) for row in rows}
    for step in steps.values():
        step.seconds(1)  # warm
    seen = np.array([[step.seconds(args.steps) for step in steps.values()] for _ in range(args.rounds)])
    ratios = np.quantile(seen / seen[:, :1], (0.25, 0.5, 0.75), axis=0).T
    first = next(iter(steps.values()))
    print("| model | time of a step | middle half | operations | memory |\n|---|---|---|---|---|")
    for (name, step), (low, middle, high) in zip(steps.items(), ratios, strict=True):
        print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {step.flops / first.flops:.2f} | "
              f"{step.bytes / first.bytes:.2f} |")


if __name__ == "__main__":
    main()
