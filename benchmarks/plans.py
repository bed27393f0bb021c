"""The best plan found for each size of the suite on slices of TPUs, as a table in Markdown.

    python benchmarks/plans.py [--sizes 99m 3.9b] [--topologies v5e-16 v5p-128] [--out=plans.jsonl]

For each pair the first plans of `spectra plan --search` (by arithmetic) are compiled by libtpu until one fits, some 30
to 120 seconds each on two cores. A row is written to --out as soon as it is there, and the same command goes on after
the rows that are there already. No TPU is needed, and none was asked: speeds are bounds.
"""

import argparse
import json
import subprocess
from pathlib import Path

import jax

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.plan.program import compiled, lowered, memory
from spectra_jax.plan.search import Candidate, search
from spectra_jax.plan.topology import GIB, Topology, devices, parse
from spectra_jax.sharding import make_mesh
from spectra_jax.suite import SIZES

TOPOLOGIES = ("v5e-16", "v5e-256", "v5p-128", "v6e-16", "tpu7x-32")
TRIED = 4  # plans of a pair that are compiled at most
COLUMNS = {
    "size": "size", "topology": "topology", "mesh": "slice x data x model", "batch": "batch",
    "accumulate": "microbatches", "remat": "remat", "gib": "GiB a device", "of": "of", "mfu": "MFU at most",
    "tokens": "tokens/s a chip at most", "days": "days for 300B at least",
}


def row(size: str, topology: Topology) -> dict:
    """The first plan of a pair that libtpu compiles.

    Raises:
      UserError: nothing fits by arithmetic, or none of the first `TRIED` does.
    """
    refused = 0
    for one in search(configs.load(f"configs/trilm.py:{size}"), topology)[:TRIED]:
        try:
            program = compiled(lowered(one.config, make_mesh(one.config, devices(topology))), topology.family.memory)
        except UserError:
            refused += 1
            continue
        finally:
            jax.clear_caches()
        return {"size": size, "topology": topology.name, **_numbers(one, topology),
                "gib": round(memory(program).peak / GIB, 2)}
    raise UserError(f"{size} on {topology.name}: none of the {refused} plans that fit by arithmetic compiles")


def _numbers(one: Candidate, topology: Topology) -> dict:
    c, b = one.config, one.bound
    return {
        "mesh": " x ".join(map(str, one.shape)), "batch": c.data.batch, "accumulate": c.train.accumulate,
        "remat": c.model.remat, "estimate": round(one.memory / GIB, 2), "of": topology.family.memory,
        "mfu": f"{b.mfu:.0%}", "tokens": f"{b.tokens_per_second / b.chips:,.0f}",
        "days": f"{b.days(c.steps * c.tokens_per_step):,.1f}", "changes": " ".join(one.changes),
    }


def table(rows: list[dict]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(r[key]) for key in COLUMNS) + " |" for r in rows)])


def main() -> None:
    """Makes the rows that are missing, then prints all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--out", type=Path, default=Path("plans.jsonl"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    there = {(r["size"], r["topology"]) for r in rows}
    for topology in map(parse, args.topologies):
        for size in args.sizes:
            if (size, topology.name) not in there:
                rows.append(row(size, topology))
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(f"{size} on {topology.name}: {rows[-1]['gib']} GiB, {rows[-1]['changes']}", flush=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    print(f"\n`benchmarks/plans.py`, commit {commit.stdout.strip()}, jax {jax.__version__}\n")
    print(table(sorted(rows, key=lambda r: (args.topologies.index(r["topology"]) if r["topology"] in args.topologies
                                            else len(args.topologies), list(SIZES).index(r["size"])))))


if __name__ == "__main__":
    main()
