"""Questions in files of JSON lines, answered by log-likelihood as lm-evaluation-harness (0.4) answers them.

A line is one item, of one of three kinds, or of those of alignment.py:

    {"context": C, "choices": [A, ...], "gold": i}   which continuation of C is likeliest: acc, acc_norm
    {"prefixes": [P, ...], "suffix": S, "gold": i}   after which prefix S is likeliest (WinoGrande): acc
    {"context": C, "target": W}                      the continuation W itself (LAMBADA): perplexity, acc

Continuations are scored as they stand, with the space that they begin with. `task` names the item's row of the table,
by default the file does; `id` and other keys are not read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from spectra_jax.data.formats import json_rows
from spectra_jax.errors import UserError
from spectra_jax.evaluate import alignment, lines
from spectra_jax.evaluate.items import Answers, Item, Kind, Metric, mean_and_error, sums
from spectra_jax.evaluate.scoring import Score, encode_pairs, score
from spectra_jax.serve.load import Loaded


@dataclass(frozen=True)
class TaskQuality:
    """The metrics of one task over `items` items."""

    task: str
    items: int
    metrics: tuple[Metric, ...]


def _read_choices(task: str, row: Mapping[str, Any], where: str) -> Item:
    pairs = lines.pairs(row, where)
    return Item(task, "choices", pairs, lines.index(row["gold"], len(pairs), where, "gold"))


def _read_suffix(task: str, row: Mapping[str, Any], where: str) -> Item:
    suffix = lines.filled(lines.text(row["suffix"], where, "suffix"), where, "suffix")
    pairs = tuple((prefix, suffix) for prefix in lines.texts(row["prefixes"], where, "prefixes"))
    return Item(task, "suffix", pairs, lines.index(row["gold"], len(pairs), where, "gold"))


def _read_target(task: str, row: Mapping[str, Any], where: str) -> Item:
    context, target = (lines.text(row[key], where, key) for key in ("context", "target"))
    return Item(task, "target", ((context, lines.filled(target, where, "target")),))


def _accuracy(answers: Answers) -> tuple[Metric, ...]:
    right = [float(np.argmax(sums(scores)) == item.gold) for item, scores in answers]
    return (Metric("acc", *mean_and_error(right)),)


def _accuracies(answers: Answers) -> tuple[Metric, ...]:
    """Also per character, not per token: so that tokenizers compare."""
    lengths = [np.array([float(len(choice)) for _, choice in item.pairs]) for item, _ in answers]
    normed = [float(np.argmax(sums(scores) / n) == item.gold) for n, (item, scores) in zip(lengths, answers)]
    return *_accuracy(answers), Metric("acc_norm", *mean_and_error(normed))


def _last_words(answers: Answers) -> tuple[Metric, ...]:
    mean, error = mean_and_error([scores[0].loglikelihood for _, scores in answers])
    hit = mean_and_error([float(scores[0].greedy) for _, scores in answers])
    return Metric("perplexity", exp(-mean), exp(-mean) * error), Metric("acc", *hit)


# A line is of the last of these kinds whose name is among its keys.
KINDS: Mapping[str, Kind] = {
    "choices": Kind(("context", "choices", "gold"), _read_choices, _accuracies),
    "suffix": Kind(("prefixes", "suffix", "gold"), _read_suffix, _accuracy),
    "target": Kind(("context", "target"), _read_target, _last_words),
    **alignment.KINDS,
}
FORMATS = "; ".join("{" + ", ".join(kind.keys) + "}" for kind in KINDS.values())


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
        item = read_item(row, where, stem)
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
    return [TaskQuality(task, len(found), KINDS[kind].measure(found)) for (task, kind), found in answers.items()]


def read_item(row: Mapping[str, Any], where: str, task: str) -> Item:
    """The item of a line that stands at `where`; `task` is its name where the line has none.

    Raises:
      UserError: it is none of the formats above.
    """
    kind = next((name for name in reversed(KINDS) if name in row), None)
    if kind is None:
        raise UserError(f"{where}: the keys {', '.join(row) or '(none)'} are no item; it needs {FORMATS}")
    missing = [key for key in KINDS[kind].keys if key not in row]
    if missing:
        raise UserError(f"{where}: no {missing[0]!r}; an item with {kind!r} needs {', '.join(KINDS[kind].keys)}")
    return KINDS[kind].read(lines.text(row.get("task", task), where, "task"), row, where)
