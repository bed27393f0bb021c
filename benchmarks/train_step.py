"""Speed and memory of one training step, against PyTorch on the same weights, batches and maths.

    python benchmarks/train_step.py [--shape="D256 F640 L8 N4 V8192 B8 T512"] [--device=cpu|gpu]

Every contender is a process of its own, so that its peak memory is its own. All are started and
warmed up, then asked in turn, round after round, for a few timed steps: the noise of the machine
hits all alike, and only one computes at a time. Ratios are medians over the rounds of the ratio
within a round. The losses of the first five steps must agree, or the exit status is 1. The last
line of the output is JSON with everything; absolute times are nowhere else.

Contenders: torch-eager and torch-compile; float and tri (layers unrolled, everything kept for the
backward pass); float-remat and tri-remat (a scan over layers that keeps block inputs only).
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
from contender import Contender

from spectra_jax import config as configs
from spectra_jax import suite
from spectra_jax.checks import check
from spectra_jax.errors import UserError
from spectra_jax.schema import Config, Data, Model, Schedule, Train

# The first one that takes part is what the others are compared with.
CONTENDERS = ("torch-compile", "torch-eager", "float", "float-remat", "tri", "tri-remat")
SHAPE = "D256 F640 L8 N4 V8192 B8 T512"
QUICK = "D64 F160 L2 N2 V512 B2 T64"
FIRST = 5  # steps whose losses are compared, which also warm up
# How far those losses may be apart: the same to 4 decimals, or what bfloat16 lets one expect.
TOLERANCE = {"float32": 5e-5, "bfloat16": 2e-2}


def make_config(shape: str, device: str, overrides: Sequence[str] = ()) -> Config:
    """What the contenders share; the learning rate is constant: a line that ends where it starts.

    Args:
      shape: letters with numbers ("D256 L8"), after a size of the suite if one is named ("99m B4").

    Raises:
      UserError: a part of the shape is neither, or it breaks a rule.
    """
    sizes = dict(re.findall(r"(\w)(\d+)", SHAPE))
    for part in re.split(r"[\s,]+", shape.strip()):
        if part in suite.SIZES:
            row = suite.SIZES[part]
            sizes |= dict(D=row.D, F=row.F, L=row.L, N=row.N, V=row.V, T=suite.CONTEXT)
        elif re.fullmatch(r"[DFLNVBT]\d+", part):
            sizes[part[0]] = part[1:]
        else:
            raise UserError(
                f"--shape: {part!r} is neither a letter of {SHAPE!r} with its number nor a size "
                f"of the suite ({', '.join(suite.SIZES)})"
            )
    D, F, L, N, V, B, T = (int(sizes[name]) for name in "DFLNVBT")
    if N < 1 or D % N:
        raise UserError(f"--shape: D={D} is not divisible by N={N} heads")
    low = {"cpu": "float32", "gpu": "bfloat16"}[device]
    config = Config(
        model=Model(D=D, F=F, L=L, N=N, K=N, H=D // N, V=V, compute_dtype=low),
        data=Data(batch=B, T=T),
        train=Train(steps=1_000_000),
        schedule=Schedule(shape="linear", peak=1e-3, warmup=0.0, final=1.0),
    )
    return configs.override(check(config), overrides)


def measure(
    names: Sequence[str], config: Config, device: str, steps: int, rounds: int
) -> tuple[dict, dict[str, dict]]:
    """Facts about the work, and what was seen of every contender."""
    start = partial(Contender, config=config, device=device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with start("float-remat", folder=folder) as writer:
            writer.receive()
            facts = writer.ask("weights")
        contenders = {name: stack.enter_context(start(name, folder=folder)) for name in names}
        for contender in contenders.values():
            contender.receive()
        seen = {}
        for name, contender in contenders.items():
            say(f"warming up {name}")
            warm = [contender.ask("steps", steps=[i]) for i in range(FIRST)]
            usual = median(step["seconds"] for step in warm[1:])
            seen[name] = {
                "losses": [step["losses"][0] for step in warm],
                "compile_seconds": warm[0]["seconds"] - usual,
                "step_seconds": [],
            }
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            todo = list(range(FIRST + i * steps, FIRST + (i + 1) * steps))
            for k in range(len(names)):  # each round begins with another one
                name = names[(i + k) % len(names)]
                seconds = contenders[name].ask("steps", steps=todo)["seconds"]
                seen[name]["step_seconds"].append(seconds / steps)
        for name, contender in contenders.items():
            seen[name] |= contender.ask("finish")
    return facts, seen


def summarise(facts: Mapping, seen: Mapping[str, Mapping], config: Config) -> dict:
    """Ratios to the baseline, and the bound: the FLOPs of a step at the best rate of a matmul."""
    base = next(name for name in CONTENDERS if name in seen)
    flops = facts["flops_per_token"] * config.tokens_per_step
    peak = max((s["peak_flops"] for s in seen.values() if s["peak_flops"]), default=None)
    contenders = {}
    for name, s in seen.items():
        speed = ratios(seen[base]["step_seconds"], s["step_seconds"])
        seconds = median(s["step_seconds"])
        compiling = s["compile_seconds"] / seen[base]["compile_seconds"]
        contenders[name] = dict(s) | {
            "tokens_per_second": config.tokens_per_step / seconds,
            "speed_ratio": median(speed),
            "speed_ratio_range": [min(speed), max(speed)],
            "memory_ratio": s["memory_bytes"] / seen[base]["memory_bytes"],
            "compile_ratio": compiling if base == "torch-compile" else None,
            "fraction_of_peak": flops / seconds / peak if peak else None,
        }
    pairs = {a.replace("float", "tri"): a for a in seen if a.startswith("float")}
    return {
        "baseline": base,
        "flops_per_step": flops,
        "peak_flops": peak,
        "bound_step_seconds": flops / peak if peak else None,
        "loss_spread": loss_spread(seen),
        "tri_to_float_step_time": {
            tri: median(ratios(seen[tri]["step_seconds"], seen[float_]["step_seconds"]))
            for tri, float_ in pairs.items() if tri in seen
        },
        "contenders": contenders,
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def loss_spread(seen: Mapping[str, Mapping]) -> float:
    """The largest difference in loss between float contenders at one step; NaN if a loss is NaN."""
    losses = [s["losses"] for name, s in seen.items() if not name.startswith("tri")]
    return float(np.ptp(losses, axis=0).max()) if losses else 0.0


def table(result: Mapping) -> str:
    """What people read."""
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        f"{'':<14}{'speed':>6} {'(range)':>13}{'memory':>11}{'ratio':>7}{'compile':>9}"
        f"{'of peak':>9}  losses of the first {FIRST} steps"
    ]
    for name, c in result["contenders"].items():
        low, high = c["speed_ratio_range"]
        lines.append(
            f"{name:<14}{c['speed_ratio']:>6.2f} {f'({low:.2f}-{high:.2f})':>13}"
            f"{c['memory_bytes'] / 2**20:>7.0f} MiB{c['memory_ratio']:>7.2f}"
            f"{show(c['compile_ratio'], '.2f'):>9}{show(c['fraction_of_peak'], '.0%'):>9}  "
            + " ".join(f"{loss:.5f}" for loss in c["losses"])
        )
    lines += [
        f"speed, ratio (of memory) and compile (time) are relative to {result['baseline']}",
        f"float losses differ by at most {result['loss_spread']:.1e}",
    ]
    for name, ratio in result["tri_to_float_step_time"].items():
        lines.append(f"step time of {name} relative to its float form: {ratio:.3f}")
    return "\n".join(lines)


def origin() -> dict:
    """Where and with what this runs."""
    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {n: version(n) for n in ("jax", "jaxlib", "flax", "optax", "torch")},
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """The command line; `config` and `names` are checked.

    Raises:
      UserError: an argument that cannot work.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Other "
        "values are changed for all by --config.SECTION.KEY=VALUE, as in `spectra train`.",
    )
    arg = parser.add_argument
    arg("--shape", help=f'"{SHAPE}" (default), or a size of the suite: "99m B4"')
    arg("--device", choices=("cpu", "gpu"), default="cpu", help="gpu computes in bfloat16")
    arg("--contenders", default=",".join(CONTENDERS[:-1]), help="(default %(default)s)")
    arg("--steps", type=int, default=2, help="timed steps per round (default %(default)s)")
    arg("--rounds", type=int, default=7, help="rounds (default %(default)s)")
    arg("--quick", action="store_true", help=f'a trial: "{QUICK}", 3 rounds of 1 step')
    args, rest = parser.parse_known_args()
    if args.quick:
        args.shape, args.steps, args.rounds = args.shape or QUICK, 1, 3
    if args.steps < 1 or args.rounds < 1:
        raise UserError(f"--steps={args.steps}, --rounds={args.rounds}: both must be at least 1")
    unknown = [text for text in rest if not text.startswith("--config.")]
    args.names = args.contenders.split(",")
    unknown += [name for name in args.names if name not in CONTENDERS]
    if unknown:
        raise UserError(f"unknown {', '.join(unknown)}; contenders are {', '.join(CONTENDERS)}")
    overrides = [text.removeprefix("--config.") for text in rest]
    args.config = make_config(args.shape or SHAPE, args.device, overrides)
    return args


def main() -> int:
    """Runs the benchmark; the exit status is 1 where the losses disagree, 2 where it cannot run."""
    try:
        args, where = parse(), origin()
        facts, seen = measure(args.names, args.config, args.device, args.steps, args.rounds)
    except UserError as error:
        say(f"error: {error}")
        return 2
    result = summarise(facts, seen, args.config)
    print(table(result))
    load, cpus = where["load_average"], where["cpus"]
    print(f"load average before the start: {load:.1f} on {cpus} CPUs (ratios are best read near 0)")
    values = {"device": args.device, "config": configs.to_dict(args.config)}
    print(json.dumps(where | values | facts | result))
    tolerance = TOLERANCE[args.config.model.compute_dtype]
    if not result["loss_spread"] <= tolerance:  # not even if it is NaN
        say(f"error: float losses differ by {result['loss_spread']:.1e}, more than {tolerance}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
