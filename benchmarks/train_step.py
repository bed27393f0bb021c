"""Speed and memory of one training step, against PyTorch on the same weights, batches and maths.

    python benchmarks/train_step.py [--shape="D256 F640 L8 N4 V8192 B8 T512"]
    python benchmarks/train_step.py --device=gpu [--remat=none|dots|full] [--shape="99m B16"] [--shape=...]

Every contender is a process of its own, so that its peak memory is its own. All are started and
warmed up, then asked in turn, round after round, for a few timed steps: the noise of the machine
hits all alike, and only one computes at a time. Ratios are medians over the rounds of the ratio
within a round. The losses of the first five steps must agree, or the exit status is 1. The last
line of the output is JSON with everything (one line for each shape).

Contenders: torch-eager and torch-compile; float and tri (layers unrolled, everything kept for the
backward pass); float-remat and tri-remat (a scan over layers that keeps block inputs only). With
--remat other than none, float and tri too are a scan, under that policy.

On a GPU they compute in bfloat16, with parameters and AdamW in float32, and ours with cuDNN's
attention (PyTorch's is `scaled_dot_product_attention`). By default three sizes of the suite run,
each with a batch at which three contenders should fit on an H200 together: ours take 10, 18 and 26
GiB each by the compiler. A table in Markdown for LOG.md has tokens per second and model FLOPs
utilisation, too. Where PyTorch sees no GPU, ours run alone.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from contender import FIRST, measure, say

from spectra_jax import config as configs
from spectra_jax import suite
from spectra_jax.checks import check
from spectra_jax.errors import UserError
from spectra_jax.schema import Config, Data, Model, Schedule, Train

# The first one that takes part is what the others are compared with.
CONTENDERS = ("torch-compile", "torch-eager", "float", "float-remat", "tri", "tri-remat")
SHAPE = "D256 F640 L8 N4 V8192 B8 T512"
QUICK = "D64 F160 L2 N2 V512 B2 T64"
DEFAULTS = {
    "cpu": dict(shape=[SHAPE], contenders=",".join(CONTENDERS[:-1]), steps=2, rounds=7),
    "gpu": dict(
        shape=["99m B16", "390m B8", "1.1b B4"], contenders="torch-compile,float,tri", steps=10, rounds=5
    ),
}
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
    # Without a warm-up, the large models of a GPU would not bear the rate of the small one.
    low, form, peak = {"cpu": ("float32", "causal_blocks", 1e-3), "gpu": ("bfloat16", "cudnn", 1e-4)}[device]
    config = Config(
        model=Model(D=D, F=F, L=L, N=N, K=N, H=D // N, V=V, compute_dtype=low, attention=form),
        data=Data(batch=B, T=T),
        train=Train(steps=1_000_000),
        schedule=Schedule(shape="linear", peak=peak, warmup=0.0, final=1.0),
    )
    return configs.override(check(config), overrides)


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
        "versions": {n: version(n) for n in ("jax", "jaxlib", "flax", "optax", "torch") if find_spec(n)},
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def log_entry(runs: Mapping[str, Mapping], where: Mapping) -> str:
    """All shapes in one table of Markdown, as LOG.md has them.

    Args:
      runs: what `summarise` made, by shape.
      where: `origin`, and how it was run: `device`, `remat`, `attention`, `dtype`, `steps`, `rounds`.
    """
    seen = {c["device"]: None for run in runs.values() for c in run["contenders"].values()}
    base = next(iter(runs.values()))["baseline"]
    software = {c["software"]: None for run in runs.values() for c in run["contenders"].values()}
    absent = {f"{name}: {why}": None for run in runs.values() for name, why in run["absent"].items()}
    dirty = " and uncommitted changes" if where["uncommitted_changes"] else ""
    lines = [
        f"## {where['date']}: a training step on {', '.join(seen)}",
        "",
        f"`python benchmarks/train_step.py --device={where['device']} --remat={where['remat']}`, commit "
        f"`{where['commit']}`{dirty}, {'; '.join(software)}. {where['dtype']}, attention {where['attention']}. Medians "
        f"of {where['rounds']} rounds of {where['steps']} steps; MFU by 6 P + 12 L N H T FLOPs a token.",
        *(f"Not measured: {reason}." for reason in absent),
        "",
        f"| shape | contender | tokens/s | MFU | speed / {base} (range) | step of TriLM / FloatLM | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, run in runs.items():
        for name, c in run["contenders"].items():
            low, high = c["speed_ratio_range"]
            lines.append(
                f"| {shape} | {name} | {c['tokens_per_second']:,.0f} | {show(c['fraction_of_peak'], '.1%')} "
                f"| {c['speed_ratio']:.2f} ({low:.2f}-{high:.2f}) "
                f"| {show(run['tri_to_float_step_time'].get(name), '.3f')} | {c['memory_bytes'] / 2**30:.1f} GiB |"
            )
    return "\n".join(lines)


def show(value: float | None, form: str) -> str:
    """The number, or a dash."""
    return "-" if value is None else format(value, form)


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
    arg("--shape", action="append", help=f'"{SHAPE}" or a size of the suite, "99m B4"; more than once for several')
    arg("--device", choices=("cpu", "gpu"), default="cpu", help="gpu computes in bfloat16")
    arg("--remat", choices=("none", "dots", "full"), default="none", help="of float and tri (default %(default)s)")
    arg("--contenders", help=f"(default {DEFAULTS['cpu']['contenders']}; on a GPU {DEFAULTS['gpu']['contenders']})")
    arg("--steps", type=int, help="timed steps per round (default 2, on a GPU 10)")
    arg("--rounds", type=int, help="rounds (default 7, on a GPU 5)")
    arg("--quick", action="store_true", help=f'a trial: "{QUICK}", 3 rounds of 1 step')
    args, rest = parser.parse_known_args()
    if args.quick:
        args.shape, args.steps, args.rounds = args.shape or [QUICK], 1, 3
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps < 1 or args.rounds < 1:
        raise UserError(f"--steps={args.steps}, --rounds={args.rounds}: both must be at least 1")
    unknown = [text for text in rest if not text.startswith("--config.")]
    args.names = args.contenders.split(",")
    unknown += [name for name in args.names if name not in CONTENDERS]
    if unknown:
        raise UserError(f"unknown {', '.join(unknown)}; contenders are {', '.join(CONTENDERS)}")
    overrides = [f"model.remat={args.remat}"] + [text.removeprefix("--config.") for text in rest]
    args.configs = {shape: make_config(shape, args.device, overrides) for shape in args.shape}
    return args


def main() -> int:
    """Runs the benchmark; the exit status is 1 where the losses disagree, 2 where it cannot run."""
    runs, apart = {}, []
    try:
        args, where = parse(), origin()
        for shape, config in args.configs.items():
            facts, seen = measure(args.names, config, args.device, args.steps, args.rounds)
            runs[shape] = facts | summarise(facts, seen, config)
            print(f"{shape}\n{table(runs[shape])}" if len(args.configs) > 1 else table(runs[shape]), flush=True)
            spread, tolerance = runs[shape]["loss_spread"], TOLERANCE[config.model.compute_dtype]
            if not spread <= tolerance:  # not even if it is NaN
                apart.append(f"{shape}: float losses differ by {spread:.1e}, more than {tolerance}")
    except UserError as error:
        say(f"error: {error}")
        return 2
    load, cpus = where["load_average"], where["cpus"]
    print(f"load average before the start: {load:.1f} on {cpus} CPUs (ratios are best read near 0)")
    if args.device == "gpu" or len(runs) > 1:
        m = config.model
        how = dict(device=args.device, remat=m.remat, attention=m.attention, dtype=m.compute_dtype)
        print("\n" + log_entry(runs, where | how | dict(steps=args.steps, rounds=args.rounds)) + "\n")
    for shape, run in runs.items():
        values = {"device": args.device, "config": configs.to_dict(args.configs[shape])}
        print(json.dumps(where | values | run))
    for line in apart:
        say(f"error: {line}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
