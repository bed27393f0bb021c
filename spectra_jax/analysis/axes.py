"""Models along three axes, after "A Comprehensive Evaluation of Quantization Strategies" (arXiv 2402.16775).

    capacity     perplexity of texts, questions answered by log-likelihood
    alignment    TruthfulQA, CrowS-Pairs, BBQ, or whatever questions are given for it
    efficiency   stored bits with scales and maps, bytes that decoding reads for a token, tokens per second measured

and by rank how far perplexity stands for the rest. The paper runs instruction-tuned models on generative tasks; the
base models here answer the tasks of Spectra (arXiv 2407.12327) in their place. What is measured of a run is kept in its
folder, by step, so that later calls may add to it.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from spectra_jax.analysis import runs
from spectra_jax.analysis.sizes import bytes_per_token, sizes
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data import sources
from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError
from spectra_jax.evaluate.items import Item, mean_and_error
from spectra_jax.evaluate.perplexity import short_names
from spectra_jax.evaluate.tasks import evaluate_tasks, read_items
from spectra_jax.evaluate.windows import evaluate_texts
from spectra_jax.serve.generate import Generator, Speed
from spectra_jax.serve.load import Loaded, load
from spectra_jax.stored import parse_checkpoint
from spectra_jax.weights.form import is_form
from spectra_jax.weights.frozen import Frozen

FILE = "axes.json"
AXES = ("capacity", "alignment", "efficiency")
RATIOS = ("stored_bits", "bytes_per_token", "tokens_per_second")  # also as shares of the first model's
PROMPT, NEW, ROUNDS = 16, 64, 5  # tokens read and written, and how often, where the context has room for them

Row = dict[str, Any]


def measure(
    folders: Sequence[str | Path], *, texts: Sequence[str | Path] = (), tasks: Sequence[str | Path] = (),
    alignment: Sequence[str | Path] = (), limit: int | None = None, weights: str = "dense",
) -> None:
    """Evaluates runs, and writes what was found to `axes.json` in their folders, beside what is there of other tasks.

    Args:
      texts: whole documents, as `spectra evaluate --texts` takes them. tasks, alignment: files of questions
        (evaluate/tasks.py), the first `limit` of each task; they differ in the axis that they count for.
      weights: what decoding is measured with, as `spectra generate --weights`; models that have no ternary or binary
        matrices are measured with dense ones.

    Raises:
      UserError: no such run or file, a name that is given twice, or as `evaluate_texts` and `evaluate_tasks`.
    """
    paths = sources.expand(texts) if texts else []
    documents = {name: list(sources.documents(path)) for name, path in zip(short_names(paths), paths)}
    asked = {"capacity": tasks, "alignment": alignment}
    items = {axis: [item for path in files for item in read_items(path, limit)] for axis, files in asked.items()}
    names = [*documents, *(name for some in items.values() for name in {item.task for item in some})]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)}: twice among --texts, --tasks and --alignment; each is of one of them")
    for run in runs.expand(folders):
        model = load(run)
        found = _texts(model, documents)
        for axis, some in items.items():
            found += _questions(model, axis, some) if some else []
        found += _bits(model) + _speed(model, weights)  # that last one takes the weights
        _keep(run, model.step, found)


def is_measured(run: str | Path) -> bool:
    """Whether anything was measured of this step of a run."""
    return bool(_kept(run))


def table(folders: Sequence[str | Path]) -> pd.DataFrame:
    """What was measured: run, family, axis, of (text, task, or model), metric, value, error, items, on.

    `error` is one standard error; `items` counts tokens predicted or questions; `on` is a fingerprint of the text or
    the questions, and of speeds the machine. Runs of which nothing was measured are left out.

    Raises:
      UserError: nothing was measured, or one task or text on different content.
    """
    found = runs.expand(folders)
    families = {run: runs.read_config(parse_checkpoint(run)[0]).family for run in found}
    rows = [
        {"run": name, "family": families[run], **row}
        for name, run in zip(short_names(found), found) for row in _kept(run)
    ]
    if not rows:
        raise UserError("nothing was measured of these runs; name --texts, --tasks or --alignment to do it")
    values = pd.DataFrame(rows)
    for (axis, of, _), some in values.groupby(["axis", "of", "metric"]):
        if axis != "efficiency" and some["on"].nunique() > 1:
            a, b = some.drop_duplicates("on")["run"][:2]
            raise UserError(f"{of}: {a} and {b} were measured on different content; measure both in one call")
    return values


def along(values: pd.DataFrame, axis: str) -> pd.DataFrame:
    """One row for each run, a column for each metric of an axis; of efficiency also as shares of the first run's.

    A speed is compared with one that was measured in the same way on the same kind of machine, and with no other.
    """
    some = values[values["axis"] == axis]
    names = some["metric"] if axis == "efficiency" else some["of"] + " " + some["metric"]
    found = some.assign(name=names).pivot(index="run", columns="name", values="value")
    found = found.reindex(index=some["run"].unique(), columns=names.unique())
    if axis == "efficiency" and len(found):
        speeds = some[some["metric"] == "tokens_per_second"].set_index("run")["on"]
        for name in RATIOS:
            found[f"{name} of first"] = found[name] / found[name].iloc[0]
        found.loc[speeds[speeds != speeds.iloc[0]].index, "tokens_per_second of first"] = np.nan
        found["measured on"] = speeds
    return found.rename_axis(columns=None).reset_index()


def _texts(model: Loaded, documents: Mapping[str, list[str]]) -> list[Row]:
    rows = []
    for name, some in documents.items():
        q, on = evaluate_texts(model, some), _fingerprint(some)
        for metric, value, error in (("perplexity", q.perplexity, q.perplexity_error),
                                     ("bits_per_byte", q.bits_per_byte, q.bits_per_byte_error)):
            rows.append(_row("capacity", name, metric, value, error, q.tokens, on))
    return rows


def _questions(model: Loaded, axis: str, items: Sequence[Item]) -> list[Row]:
    asked: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        asked.setdefault((item.task, item.kind), []).append(item)
    return [
        _row(axis, task.task, m.name, m.value, m.error, task.items, _fingerprint(some))
        for task, some in zip(evaluate_tasks(model, items), asked.values()) for m in task.metrics
    ]


def _bits(model: Loaded) -> list[Row]:
    size = sizes(model.config, model.parameters)
    found = {name: size[name] for name in ("stored_bits", "bits_per_weight")}
    found |= bytes_per_token(model.config, model.parameters)
    return [_row("efficiency", "model", name, float(value), 0.0, 1, "arithmetic") for name, value in found.items()]


def _speed(model: Loaded, weights: str) -> list[Row]:
    """Tokens per second after a prompt, of a sequence on every device of the data axes: the median of some rounds.

    The weights of the model are gone afterwards.
    """
    frozen = any(isinstance(node, Frozen) for node in jax.tree.leaves(model.parameters, is_leaf=is_form))
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.eod = -1  # a document that does not end: every round writes as much
    generator = Generator(replace(model, tokenizer=tokenizer), weights=weights if frozen else "dense", release=True)
    T, devices = model.config.data.T, model.mesh.devices.size
    length = max(min(PROMPT, T // 4), 1)
    new, sequences = min(NEW, T + 1 - length), model.mesh.shape["slice"] * model.mesh.shape["data"]
    prompts = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (sequences, length)).tolist()
    generator.generate(prompts, max_new_tokens=new, temperature=0)  # compiles
    rates = []
    for _ in range(ROUNDS):
        generator.speed = Speed()
        generator.generate(prompts, max_new_tokens=new, temperature=0)
        rates.append(generator.speed.decode_tokens / generator.speed.decode_seconds)
    kind = model.mesh.devices.flat[0].device_kind
    on = (f"{devices} x {kind}" + (f" ({os.cpu_count()} cores)" if kind == "cpu" else "")
          + f", weights by {generator.weights!r}, {sequences} x {new} tokens")
    _, error = mean_and_error(rates)
    return [_row("efficiency", "model", "tokens_per_second", float(np.median(rates)), error, ROUNDS, on)]


def _row(axis: str, of: str, metric: str, value: float, error: float, items: int, on: str) -> Row:
    return {"axis": axis, "of": of, "metric": metric, "value": value, "error": error, "items": items, "on": on}


def _fingerprint(content: Sequence[str | Item]) -> str:
    return hashlib.sha256("\0".join(map(repr, content)).encode()).hexdigest()[:16]


def _file(run: str | Path) -> tuple[Path, dict[str, list[Row]]]:
    path = parse_checkpoint(str(run))[0] / FILE
    try:
        return path, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; delete it and measure again") from error


def _kept(run: str | Path) -> list[Row]:
    path, steps = _file(run)
    if not steps:
        return []
    checkpoints = Checkpoints(path.parent)
    step = checkpoints.chosen(parse_checkpoint(str(run))[1])[-1]
    checkpoints.close()
    return steps.get(str(step), [])


def _keep(run: str | Path, step: int, found: list[Row]) -> None:
    path, steps = _file(run)
    new = {(row["axis"], row["of"]) for row in found}
    rest = [row for row in steps.get(str(step), []) if (row["axis"], row["of"]) not in new]
    steps[str(step)] = rest + [
        {key: None if value != value else value for key, value in row.items()} for row in found  # JSON has no NaN
    ]
    try:
        write_text(path, json.dumps(steps, indent=1), path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; measure a copy of the run") from error
