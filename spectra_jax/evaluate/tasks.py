"""Questions in files of JSON lines, answered by log-likelihood as lm-evaluation-harness (0.4) answers them.

A line is one item, of one of three kinds:

    {"context": C, "choices": [A, ...], "gold": i}   which continuation of C is likeliest: acc, acc_norm
    {"prefixes": [P, ...], "suffix": S, "gold": i}   after which prefix S is likeliest (WinoGrande): acc
    {"context": C, "target": W}                      the continuation W itself (LAMBADA): perplexity, acc

Continuations are scored as they stand, with the space that they begin with. `task` names the item's row of the table,
by default the file does; `id` and other keys are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from spectra_jax.data.formats import json_rows
from spectra_jax.errors import UserError
from spectra_jax.evaluate.scoring import Score, encode_pairs, score
from spectra_jax.serve.load import Loaded

KINDS = {"choices": ("context", "choices", "gold"), "suffix": ("prefixes", "suffix", "gold"),
         "target": ("context", "target")}
FORMATS = "; ".join("{" + ", ".join(keys) + "}" for keys in KINDS.values())


@dataclass(frozen=True)
class Item:
    """One question: (context, continuation) of every answer, and which is right; a `target` has only the right one."""

    task: str
    kind: str
    pairs: tuple[tuple[str, str], ...]
    gold: int = 0


@dataclass(frozen=True)
class Metric:
    """A mean over items, or the exponential of one, with its standard error."""

    name: str
    value: float
    error: float


@dataclass(frozen=True)
class TaskQuality:
    """The metrics of one task over `items` items."""

    task: str
    items: int
    metrics: tuple[Metric, ...]


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """The items of a file (.jsonl, also .gz, .xz, .zst), the first `limit` of each task or all.

    Raises:
      UserError: the file or a line of it is none of the formats above; the message names file and line.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit={limit} leaves no item; ask for at least 1, or leave it out for all")
    found: dict[tuple[str, str], list[Item]] = {}
    stem = Path(path).name.split(".")[0]
    for where, row in json_rows(str(path), f"an item: {FORMATS}"):
        item = _item(row, where, stem)
        same = found.setdefault((item.task, item.kind), [])
        if limit is None or len(same) < limit:
            same.append(item)
    if not found:
        raise UserError(f"{path} holds no item; a line holds one of {FORMATS}")
    return [item for same in found.values() for item in same]


def evaluate_tasks(model: Loaded, items: Sequence[Item]) -> list[TaskQuality]:
    """The metrics of every task (and kind) among the items, in the order in which they come.

    All continuations of all tasks are scored together, so that batches are full.

    Raises:
      UserError: a continuation is empty of tokens or longer than the context of the model.
    """
    texts = [pair for item in items for pair in item.pairs]
    scores, at = score(model, encode_pairs(model.tokenizer, texts)), 0
    answers: dict[tuple[str, str], list[tuple[Item, list[Score]]]] = {}
    for item in items:
        answers.setdefault((item.task, item.kind), []).append((item, scores[at : at + len(item.pairs)]))
        at += len(item.pairs)
    return [TaskQuality(task, len(found), _metrics(found)) for (task, _), found in answers.items()]


def _metrics(answers: list[tuple[Item, list[Score]]]) -> tuple[Metric, ...]:
    kind = answers[0][0].kind
    if kind == "target":
        mean, error = mean_and_error([found[0].loglikelihood for _, found in answers])
        hit = mean_and_error([float(found[0].greedy) for _, found in answers])
        return Metric("perplexity", exp(-mean), exp(-mean) * error), Metric("acc", *hit)
    sums = [np.array([one.loglikelihood for one in found]) for _, found in answers]
    right = [float(np.argmax(s) == item.gold) for s, (item, _) in zip(sums, answers)]
    metrics = [Metric("acc", *mean_and_error(right))]
    if kind == "choices":  # per character, not per token: so that tokenizers compare
        lengths = [np.array([float(len(text)) for _, text in item.pairs]) for item, _ in answers]
        normed = [float(np.argmax(s / n) == item.gold) for s, n, (item, _) in zip(sums, lengths, answers)]
        metrics.append(Metric("acc_norm", *mean_and_error(normed)))
    return tuple(metrics)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for the error of one value."""
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1)) / sqrt(n) if n > 1 else nan


def _item(row: dict[str, Any], where: str, stem: str) -> Item:
    kind = next((kind for kind in KINDS if kind in row), None)
    if kind is None:
        raise UserError(f"{where}: the keys {', '.join(row) or '(none)'} are no item; it needs {FORMATS}")
    missing = [key for key in KINDS[kind] if key not in row]
    if missing:
        raise UserError(f"{where}: no {missing[0]!r}; an item with {kind!r} needs {', '.join(KINDS[kind])}")
    task = _text(row.get("task", stem), where, "task")
    if kind == "target":
        context, target = (_text(row[key], where, key) for key in ("context", "target"))
        return Item(task, kind, ((context, _filled(target, where, "target")),))
    if kind == "choices":
        context, choices = _text(row["context"], where, "context"), _texts(row["choices"], where, "choices")
        pairs = tuple((context, _filled(choice, where, "choices")) for choice in choices)
    else:
        suffix = _filled(_text(row["suffix"], where, "suffix"), where, "suffix")
        pairs = tuple((prefix, suffix) for prefix in _texts(row["prefixes"], where, "prefixes"))
    gold = row["gold"]
    if type(gold) is not int or not 0 <= gold < len(pairs):
        raise UserError(f"{where}: gold={gold!r} is not one of the {len(pairs)} answers; they count from 0 to "
                        f"{len(pairs) - 1}")
    return Item(task, kind, pairs, gold)


def _text(value: Any, where: str, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} holds a {type(value).__name__}, not a string")
    return value


def _texts(value: Any, where: str, key: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        count = f"{len(value)} of them" if isinstance(value, list) else f"a {type(value).__name__}"
        raise UserError(f"{where}: {key!r} holds {count}; a question needs a list of at least 2 strings")
    return [_text(one, where, key) for one in value]


def _filled(text: str, where: str, key: str) -> str:
    if not text:
        raise UserError(f"{where}: {key!r} holds an empty string, which has no likelihood; give it text")
    return text
