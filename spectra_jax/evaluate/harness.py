"""`spectra harness`: tasks of lm-evaluation-harness, run in this process on a checkpoint, as a table."""

import difflib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spectra_jax.errors import UserError
from spectra_jax.evaluate.published import PAPER, average, published
from spectra_jax.serve.load import load

PRESETS = {"paper": PAPER}


def evaluate_harness(
    checkpoint: str, tasks: Sequence[str], *, include: str | None = None, limit: int | None = None,
    shots: int | None = None, out: str | None = None, beside: str | None = None,
) -> str:
    """A table of every metric with its standard error.

    Args:
      tasks: names of tasks, groups or tags of lm-evaluation-harness, or "paper": Spectra's thirteen.
      include: a folder with tasks of one's own (.yaml).
      limit: items of each task, by default all.
      shots: examples in the prompt; by default none with "paper", and otherwise what each task says.
      out: file for the results as JSON, with what is needed to repeat them.
      beside: a published model such as TriLM-1.1B, printed beside.

    Raises:
      UserError: lm-eval is missing, an unknown task, model or folder, or a data set that cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; pip install 'spectra_jax[harness]'")
    other = published(beside) if beside else None
    if out and not Path(out).absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {Path(out).absolute().parent}; make it first")
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} leaves no item; ask for at least 1, or leave it out for all")
    names = [name for task in tasks for name in PRESETS.get(task, (task,))]
    manager = _manager(names, include)
    model = load(checkpoint)
    found = _run(model, names, manager, limit, 0 if shots is None and "paper" in tasks else shots)
    facts = {
        "checkpoint": checkpoint, "family": model.config.family, "name": model.config.name, "step": model.step,
        "lm_eval": version("lm_eval"), "limit": limit,
        **{key: found.get(key) for key in ("results", "groups", "n-shot", "n-samples", "versions")},
    }
    if out:
        Path(out).write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
    title = f"{facts['family']} {facts['name']}, step {facts['step']}, lm-evaluation-harness {facts['lm_eval']}"
    return "\n".join([title, *table(found["results"], other, beside or "")])


def table(results: Mapping[str, Mapping[str, Any]], other: Mapping | None = None, name: str = "") -> list[str]:
    """The rows of a table of `results` as lm-evaluation-harness returns them, with another model's values beside."""
    rows = [f"{'task':<32} {'metric':<16} {'value':>19}" + (f" {name:>18}" if other is not None else "")]
    values = {}

    def add(task: str, metric: str, value: float, error: Any, beside: float | None) -> None:
        told = f"{value:>9.4f} +- {error:.4f}" if isinstance(error, float) else f"{value:>9.4f}          "
        text = "-" if beside is None else f"{beside:.4f}"
        rows.append(f"{task:<32} {metric:<16} {told:>19}" + (f" {text:>18}" if other is not None else ""))

    for task, found in results.items():
        for key, value in found.items():
            metric, _, filter = key.partition(",")
            if filter and not metric.endswith("_stderr") and isinstance(value, float | int):
                values[task, metric] = float(value)
                beside = None if other is None else other.get((task, metric))
                add(task, metric, values[task, metric], found.get(f"{metric}_stderr,{filter}"), beside)
    if (mean := average(values)) is not None:
        add("average of the paper's six", "", mean, None, average(other) if other is not None else None)
    return rows


def _manager(names: Iterable[str], include: str | None) -> Any:
    """lm-evaluation-harness's index of tasks, without its own 14,000 where the user's folder holds all of `names`."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        if not Path(include).is_dir():
            raise UserError(f"--include={include} is no folder; give the one that holds the .yaml of your tasks")
        own = TaskManager(include_path=include, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*manager.all_tasks, *PRESETS], n=1)
            hint = f"did you mean {near[0]}?" if near else "lm_eval ls tasks lists them"
            raise UserError(f"unknown task {name!r} among {len(manager.all_tasks):,}; {hint}")
    return manager


def _run(model: Any, names: list[str], manager: Any, limit: int | None, shots: int | None) -> dict[str, Any]:
    import lm_eval

    from spectra_jax.evaluate.adapter import SpectraLM

    # Its bootstrap would fork this process, whose threads belong to JAX and do not survive that.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        return lm_eval.simple_evaluate(
            model=SpectraLM(model), tasks=names, num_fewshot=shots, limit=limit, task_manager=manager,
            bootstrap_iters=1000, log_samples=False,
        )
    except OSError as error:  # what the datasets package raises on data it can neither find nor download
        raise UserError(f"the data of {', '.join(names)} cannot be loaded: {str(error).splitlines()[0]}; tasks are "
                        "downloaded from the Hugging Face hub once") from error
