"""A sweep: the rows of one figure or table, trained one after the other, finished ones skipped.

A sweep file defines `get_sweep(arg) -> list of (row name, ConfigDict)`. A row is finished when its workdir holds
`finished.json`; a row that was stopped half-way resumes. A finished row of another config is refused, not returned.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from spectra_jax import config as configs
from spectra_jax.analysis.plots import plot_runs
from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError
from spectra_jax.schema import Config
from spectra_jax.sharding import make_mesh
from spectra_jax.train.loop import make_loader, train
from spectra_jax.train.workdir import config_changes

FINISHED = "finished.json"


def run_sweep(spec: str, workdir: Path | str, overrides: Sequence[str] = ()) -> list[dict]:
    """Trains every row of `FILE.py[:ARG]` into `workdir/ROW`, then draws `workdir/loss.png`.

    Returns:
      One dict per row: name and final losses, also written to `workdir/results.jsonl`.

    Raises:
      UserError: the file or an override is wrong (before anything is trained), or a row cannot be trained.
    """
    workdir, rows = Path(workdir), read_rows(spec, overrides)
    for name, config in rows:
        _check(workdir / name, config)
    results = []
    for number, (name, config) in enumerate(rows, 1):
        finished = workdir / name / FINISHED
        print(f"row {number} of {len(rows)}: {name}{' (finished)' if finished.is_file() else ''}", flush=True)
        if not finished.is_file():
            _write(finished, json.dumps({"name": name, **train(config, workdir / name)}, indent=1) + "\n")
            jax.clear_caches()  # the next row compiles its own programs
        results.append(json.loads(finished.read_text()))
    _write(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in results))
    plot_runs([workdir / name for name, _ in rows], workdir / "loss.png")
    return results


def read_rows(spec: str, overrides: Sequence[str] = ()) -> list[tuple[str, Config]]:
    """The rows of `FILE.py[:ARG]`, overrides applied.

    Raises:
      UserError: the file is missing, gives no rows or unusable names, or a config is wrong.
    """
    rows = configs.run_config_file(spec, "get_sweep")
    if not rows or not all(isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], str) for row in rows):
        raise UserError(f"{spec}: get_sweep must return a list of (row name, ConfigDict) pairs, at least one")
    names = [name for name, _ in rows]
    if len(set(names)) != len(names):
        raise UserError(f"{spec}: row names repeat: {names}; every row needs a folder of its own")
    for name in names:
        if name in (".", "..") or Path(name).name != name:
            raise UserError(f"{spec}: the row name {name!r} is no name of a folder")
    return [
        (name, configs.override(configs.from_config_dict(values), [f"name={name}", *overrides]))
        for name, values in rows
    ]


def _check(folder: Path, config: Config) -> None:
    """Refuses what would stop the sweep half-way: a row that cannot start, or one finished with another config."""
    if not (folder / FINISHED).is_file():
        make_mesh(config), make_loader(config, "train")
    elif changes := config_changes(folder, config):
        raise UserError(
            f"{folder} is finished with another config:\n  " + "\n  ".join(changes)
            + "\nuse a new --workdir, or remove that folder to train the row again"
        )


def table(results: Sequence[dict]) -> str:
    """The final losses of every row."""
    lines = [f"{'row':<28} {'train loss':>10} {'validation':>10}"]
    for row in results:
        losses = [row.get(kind, {}).get("loss") for kind in ("train", "eval")]
        shown = ["-" if loss is None else f"{loss:.4f}" for loss in losses]  # not finite, or never evaluated
        lines.append(f"{row['name']:<28} {shown[0]:>10} {shown[1]:>10}")
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text, path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room, and run the same command again") from error


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("sweep")
