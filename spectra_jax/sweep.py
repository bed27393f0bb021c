"""A sweep: the rows of one figure or table, trained one after the other, finished ones skipped.

A sweep file defines `get_sweep(arg) -> list of (row name, ConfigDict)`. A row is finished when its workdir holds
`finished.json`; a row that was stopped half-way resumes.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax

from spectra_jax import config as configs
from spectra_jax.analysis.plots import plot_runs
from spectra_jax.errors import UserError
from spectra_jax.train.loop import train

FINISHED = "finished.json"


def run_sweep(spec: str, workdir: Path | str, overrides: Sequence[str] = ()) -> list[dict]:
    """Trains every row of `FILE.py[:ARG]` into `workdir/ROW`, then draws `workdir/loss.png`.

    Returns:
      One dict per row: name and final losses, also written to `workdir/results.jsonl`.

    Raises:
      UserError: the file or an override is wrong (before anything is trained), or a row cannot be trained.
    """
    workdir = Path(workdir)
    rows = [
        (name, configs.override(configs.from_config_dict(values), [f"name={name}", *overrides]))
        for name, values in configs.run_config_file(spec, "get_sweep")
    ]
    names = [name for name, _ in rows]
    if len(set(names)) != len(names):
        raise UserError(f"{spec}: row names repeat: {names}")
    results = []
    for number, (name, config) in enumerate(rows, 1):
        finished = workdir / name / FINISHED
        print(f"row {number} of {len(rows)}: {name}{' (finished)' if finished.is_file() else ''}", flush=True)
        if not finished.is_file():
            _write(finished, {"name": name, **train(config, workdir / name)})
            jax.clear_caches()  # the next row compiles its own programs
        results.append(json.loads(finished.read_text()))
    temporary = workdir / ".results.jsonl"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in results))
    os.replace(temporary, workdir / "results.jsonl")
    plot_runs([workdir / name for name in names], workdir / "loss.png")
    return results


def table(results: Sequence[dict]) -> str:
    """The final losses of every row."""
    lines = [f"{'row':<28} {'train loss':>10} {'validation':>10}"]
    for row in results:
        held_out = row.get("eval", {}).get("loss")
        lines.append(
            f"{row['name']:<28} {row['train']['loss']:>10.4f} {'-' if held_out is None else f'{held_out:.4f}':>10}"
        )
    return "\n".join(lines)


def _write(path: Path, content: dict) -> None:
    temporary = path.with_name("." + path.name)
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("sweep")
