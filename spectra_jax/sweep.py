"""A sweep: the rows of one figure or table, made one after the other, finished ones skipped.

A sweep file defines `get_sweep(arg)`, a list of (row name, ConfigDict) for models to train, and of (row name,
ConfigDict, name of a row before it) for QuantLMs to make of that row's model. A row is finished when its workdir holds
`finished.json`; a row that was stopped half-way resumes. A finished row of another config is refused, not returned.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from spectra_jax import compare
from spectra_jax import config as configs
from spectra_jax.analysis.plots import plot_runs
from spectra_jax.analysis.runs import FINISHED, HELD_OUT
from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError
from spectra_jax.evaluate.perplexity import combined, short_names
from spectra_jax.evaluate.report import losses_on
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.schema import Config
from spectra_jax.serve.load import load
from spectra_jax.sharding import make_mesh
from spectra_jax.train.loop import make_loader, train
from spectra_jax.train.workdir import config_changes
from spectra_jax.weights import get_rule


class Row(NamedTuple):
    """One model of a sweep: trained, or quantized from that of the row `of`."""

    name: str
    config: Config
    of: str = ""


def run_sweep(spec: str, workdir: Path | str, overrides: Sequence[str] = ()) -> list[dict]:
    """Makes every row of `FILE.py[:ARG]` in `workdir/ROW`, then draws `workdir/loss.png`.

    Returns:
      One dict per row, as `run_row` gives it, also written to `workdir/results.jsonl`.

    Raises:
      UserError: the file or an override is wrong (before anything is trained), or a row cannot be made.
    """
    workdir, rows = Path(workdir), read_rows(spec, overrides)
    for row in rows:
        check_row(row, workdir)
    results = []
    for number, row in enumerate(rows, 1):
        finished = workdir / row.name / FINISHED
        print(f"row {number} of {len(rows)}: {row.name}{' (finished)' if finished.is_file() else ''}", flush=True)
        if not finished.is_file():
            run_row(row, workdir)
        results.append(json.loads(finished.read_text()))
    _write(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in results))
    plot_runs([workdir / row.name for row in rows if not row.of], workdir / "loss.png")
    return results


def run_row(row: Row, workdir: Path) -> dict[str, Any]:
    """Trains or quantizes one row and measures it on the whole validation split.

    Returns:
      What `finished.json` then holds: `compare.row`, and of a trained one its last records of training and evaluation.

    Raises:
      UserError: it cannot be trained, quantized or written.
    """
    folder, last = workdir / row.name, {}
    if not row.of:
        last = train(row.config, folder)
    elif not folder.exists():  # a made run appears whole
        quantize(str(workdir / row.of), row.config, folder)
    jax.clear_caches()  # whatever comes next compiles its own programs
    model, mixture = load(str(folder)), row.config.mixture
    found = losses_on(model, [path for path, _ in mixture])
    quality = combined([one for _, one in found.values()], [weight for _, weight in mixture])
    result = {**compare.row(row.name, model, quality), **last}
    try:
        np.savez(folder / HELD_OUT, **dict(zip(short_names(list(found)), (losses for losses, _ in found.values()))))
    except OSError as error:
        raise _unwritable(folder / HELD_OUT, error) from error
    _write(folder / FINISHED, json.dumps(result, indent=1) + "\n")
    return result


def read_rows(spec: str, overrides: Sequence[str] = ()) -> list[Row]:
    """The rows of `FILE.py[:ARG]`, overrides applied.

    Raises:
      UserError: the file is missing, gives no rows or unusable names, or a config is wrong.
    """
    found = configs.run_config_file(spec, "get_sweep")
    if not found or not all(isinstance(row, tuple) and _named(row) for row in found):
        raise UserError(f"{spec}: get_sweep must return a list of (row name, ConfigDict), or of three with the name of "
                        "the row to quantize, at least one")
    names = [name for name, *_ in found]
    if len(set(names)) != len(names):
        raise UserError(f"{spec}: row names repeat: {names}; every row needs a folder of its own")
    rows: dict[str, Row] = {}
    for name, values, *of in found:
        if name in (".", "..") or Path(name).name != name:
            raise UserError(f"{spec}: the row name {name!r} is no name of a folder")
        config = configs.override(configs.from_config_dict(values), [f"name={name}", *overrides])
        rows[name] = _quantized(Row(name, config, *of), rows, spec) if of else Row(name, config)
    return list(rows.values())


def _named(row: tuple) -> bool:
    """Whether it is a name with a config, and perhaps the name of another row."""
    return len(row) in (2, 3) and all(isinstance(text, str) for text in (row[0], *row[2:]))


def _quantized(row: Row, before: dict[str, Row], spec: str) -> Row:
    """The row with the config that the QuantLM will have: its source's but for what `spectra quantize` sets."""
    source = before.get(row.of)
    if source is None or source.of or get_rule(source.config.model.weight).quantized:
        raise UserError(f"{spec}: the row {row.name!r} is to be quantized from {row.of!r}, which is no float row before"
                        f" it; the rows before it are {', '.join(before) or 'none'}")
    if row.config.quantize.method == "none":
        raise UserError(f"{spec}: the row {row.name!r} names no config.quantize.method")
    config = replace(source.config, family=row.config.family, name=row.name, quantize=row.config.quantize)
    return Row(row.name, config, row.of)


def check_row(row: Row, workdir: Path) -> None:
    """Refuses what would stop the sweep half-way: a row that cannot start, or one finished with another config.

    Raises:
      UserError: as said.
    """
    folder = workdir / row.name
    if not (folder / FINISHED).is_file():
        make_mesh(row.config), make_loader(row.config, "train")
    elif changes := config_changes(folder, row.config):
        raise UserError(
            f"{folder} is finished with another config:\n  " + "\n  ".join(changes)
            + "\nuse a new --workdir, or remove that folder to make the row again"
        )


def shares(rows: Sequence[Row], workers: int) -> list[int]:
    """For every row which of so many workers makes it: trained ones by turns, quantized ones with their source."""
    worker, trained = {}, itertools.count()
    for row in rows:
        worker[row.name] = worker[row.of] if row.of else next(trained) % workers
    return list(worker.values())


def table(results: Sequence[dict]) -> str:
    """Size and quality of every row; the last loss of training where there was any."""
    wide = max(len("row"), *(len(row["name"]) for row in results))
    lines = [f"{'row':<{wide}} {'parameters':>11} {'per weight':>10} {'train loss':>10} {'validation':>17}"]
    for row in results:
        loss = row.get("train", {}).get("loss")
        trained = "-" if loss is None else f"{loss:.4f}"  # not finite, or not trained
        lines.append(f"{row['name']:<{wide}} {row['parameters']:>11,} {row['bits_per_weight']:>10.3f} {trained:>10} "
                     f"{row['loss']:>8.4f} +- {row['loss_se']:.4f}")
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text, path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; make room, and run the same command again")


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("sweep")
