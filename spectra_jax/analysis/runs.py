"""Runs as a table: what was trained or made, its size, what it read, how good it became."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from spectra_jax import metrics
from spectra_jax.analysis.sizes import shapes, sizes
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.errors import UserError, one_of
from spectra_jax.evaluate.perplexity import standard_error
from spectra_jax.stored import parse_checkpoint, record_of
from spectra_jax.train.workdir import read_config, read_fingerprint

# What a sweep writes into the folder of a row: its quality, and the losses of the validation sequences, an array for
# each set, in stored order.
FINISHED, HELD_OUT = "finished.json", "held_out.npz"
ARMS = {(True, True): "both", (False, True): "only decay removed", (True, False): "only peak lowered",
        (False, False): "neither"}
QUALITY = ("loss", "loss_se", "bits_per_byte", "bits_per_byte_se")


def expand(runs: Sequence[str | Path]) -> list[str]:
    """WORKDIR[@STEP] as it is; the folder of a sweep as those of its rows, by name.

    Raises:
      UserError: a folder that holds neither.
    """
    found = []
    for run in map(str, runs):
        folder, _ = parse_checkpoint(run.rstrip("/"))
        rows = sorted(path.parent for path in folder.glob("*/config.json"))
        if not (folder / "config.json").is_file() and not rows:
            raise UserError(f"{folder} holds no run and no rows of a sweep: there is no config.json in it or below it")
        found += [run.rstrip("/")] if (folder / "config.json").is_file() else map(str, rows)
    return found


def table(runs: Sequence[str | Path]) -> pd.DataFrame:
    """One row for every run, by its newest checkpoint; folders of sweeps stand for their rows.

    Columns: run (the folder's name), folder, name, family, weight, method and bits (of a QuantLM), seed; D, F, L, V,
    parameters, linear (those of block matrices), bits_per_weight (of these), block_bits (of all of these), stored_bits,
    paper_bits; tokens, peak (learning rate), arm (of the schedule: "both" interventions, "only decay removed", "only
    peak lowered", "neither"); loss, loss_se, bits_per_byte, bits_per_byte_se on held-out text (NaN where nothing was
    evaluated; of a run that no sweep made, the last evaluation of training, whose errors it does not know); data and
    tokenizer (hashes), step, commit.

    Raises:
      UserError: no such run, or damaged files.
    """
    return pd.DataFrame([_row(run) for run in expand(runs)])


def _row(run: str) -> dict[str, Any]:
    folder, step = parse_checkpoint(run)
    config, checkpoints = read_config(folder), Checkpoints(folder)
    step = checkpoints.chosen(step)[-1]
    record = record_of(checkpoints.path(step))
    checkpoints.close()
    m, q, size = config.model, config.quantize, sizes(config, shapes(config, record))
    return {
        "run": Path(run).name, "folder": str(folder), "name": config.name,
        **size, "block_bits": size["linear"] * size["bits_per_weight"], "weight": m.weight, "method": q.method,
        "bits": q.bits if q.method != "none" else np.nan, "seed": config.seed, "D": m.D, "F": m.F, "L": m.L, "V": m.V,
        "tokens": record["tokens"], "peak": config.schedule.peak,
        "arm": ARMS[config.schedule.lower_peak, config.schedule.remove_decay], **_quality(folder, step, config.steps),
        "data": read_fingerprint(folder), "step": step, "commit": record["git_commit"],
        "tokenizer": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    }


def _quality(folder: Path, step: int, last: int) -> dict[str, float]:
    finished = folder / FINISHED
    if finished.is_file() and (step == last or not is_trained(folder)):
        found = json.loads(finished.read_text())
        return {name: found.get(name, np.nan) for name in QUALITY}
    records = metrics.read(folder) if is_trained(folder) else []
    evaluated = [r for r in records if r["kind"] == "eval" and r["step"] == step]
    return dict.fromkeys(QUALITY, np.nan) | {"loss": evaluated[-1]["loss"] if evaluated else np.nan}


def is_trained(run: str | Path) -> bool:
    """Whether it was trained here, and not made of another model."""
    return (parse_checkpoint(str(run))[0] / metrics.FILE).is_file()


def records(run: str | Path, kind: str = "train") -> pd.DataFrame:
    """The records of one kind (train, eval, weights, event, time) that a run wrote down, one row each.

    Raises:
      UserError: no such kind, a run without metrics, or a damaged file.
    """
    one_of(kind, metrics.KINDS, "kind")
    found = [record for record in metrics.read(parse_checkpoint(str(run))[0]) if record["kind"] == kind]
    return pd.DataFrame(found).drop(columns="kind", errors="ignore")


def times(found: Sequence[str | Path]) -> pd.DataFrame:
    """Where the wall time of training runs went, in seconds: one row for each, by its last record of kind "time".

    Columns: run, goodput (a share), restarts, seconds (in all), and the names of `train/goodput.py`.

    Raises:
      UserError: a run without metrics.
    """
    rows = []
    for run in found:
        folder, _ = parse_checkpoint(str(run))
        records = [record for record in metrics.read(folder) if record["kind"] == "time"]
        if records:
            spent = {key.removeprefix("seconds/"): value for key, value in records[-1].items() if "seconds/" in key}
            rows.append({"run": folder.name, "goodput": records[-1]["goodput"], "restarts": records[-1]["restarts"],
                         "seconds": sum(spent.values()), **spent})
    return pd.DataFrame(rows)


def losses(run: str | Path) -> dict[str, Float[np.ndarray, "_"]]:
    """The losses of a sweep's row on every validation sequence, by set.

    Raises:
      UserError: the run was not made by a sweep, or is not finished.
    """
    path = Path(run) / HELD_OUT
    if not path.is_file():
        raise UserError(f"{path} is missing: rows of `spectra sweep` have it once they are finished")
    with np.load(path) as found:
        return dict(found)


def above(run: str | Path, other: str | Path) -> tuple[float, float]:
    """How far the loss of one row lies above another's, sequence by sequence, and the standard error of that.

    The error is that of the text alone: what another seed would give stands only in repeated runs.

    Raises:
      UserError: rows that were measured on different text.
    """
    a, b = losses(run), losses(other)
    if {name: x.size for name, x in a.items()} != {name: x.size for name, x in b.items()}:
        raise UserError(f"{run} and {other} were measured on different text; make both rows by one sweep")
    weights = np.array([weight for _, weight in read_config(run).mixture])
    differences = [a[name] - b[name] for name in a]
    mean = np.average([d.mean() for d in differences], weights=weights)
    error = np.linalg.norm([standard_error(d) for d in differences] * weights) / weights.sum()
    return float(mean), float(error)
