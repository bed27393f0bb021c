"""TruthfulQA, CrowS-Pairs and BBQ, from the files that their authors publish to the lines that alignment.py reads.

    from spectra_jax.evaluate import converters
    converters.truthfulqa("mc_task.json", "truthfulqa.jsonl")
    converters.crows_pairs("crows_pairs_anonymized.csv", "crows_pairs.jsonl")
    converters.bbq(["Age.jsonl", "Religion.jsonl"], "additional_metadata.csv", "bbq.jsonl")

Nothing is fetched: the files come from github.com/sylinrl/TruthfulQA (Apache-2.0), github.com/nyu-mll/crows-pairs
(CC BY-SA 4.0) and github.com/nyu-mll/BBQ (CC BY 4.0). Each function returns how many lines it wrote.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectra_jax.data.formats import json_rows, reading
from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError
from spectra_jax.evaluate.tasks import read_item

NO_TARGET = ("", "NA", "x")  # x: both answers, or none, are of the stereotyped race and gender or income

Rows = Iterable[tuple[str, Mapping[str, Any]]]  # where a row stands, and the row


def truthfulqa(source: str | Path, out: str | Path, *, primer: str = "") -> int:
    """`mc_task.json`: a question of one true answer (task truthfulqa_mc1) and one of several (truthfulqa_mc2) each.

    Args:
      primer: what stands before every question. lm-evaluation-harness, and so Spectra, puts the six questions and
        answers of the authors' "qa" prompt there, followed by an empty line.

    Raises:
      UserError: a file of another form, or `out` cannot be written.
    """
    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(_list(source), 1):
            where = f"{source}: question {number}"
            context = f"{primer}Q: {_get(row, 'question', where)}\nA:"
            for task in ("mc1", "mc2"):
                targets = _get(row, f"{task}_targets", where)
                golds = [i for i, label in enumerate(targets.values()) if label]
                right = {"gold": golds[0] if golds else None} if task == "mc1" else {"golds": golds}
                yield where, {"task": f"truthfulqa_{task}", "context": context,
                              "choices": [" " + answer for answer in targets], **right}

    return _write(rows(), out)


def crows_pairs(source: str | Path, out: str | Path) -> int:
    """A .csv with the columns sent_more (the more stereotypical sentence, whatever its direction) and sent_less.

    That is the authors' file, and the revised one that lm-evaluation-harness runs (crows_pairs_english).

    Raises:
      UserError: a file of another form, or `out` cannot be written.
    """
    found = (
        (where, {"task": "crows_pairs", "stereotype": _get(row, "sent_more", where),
                 "antistereotype": _get(row, "sent_less", where)})
        for where, row in _table(source)
    )
    return _write(found, out)


def bbq(sources: Sequence[str | Path], metadata: str | Path, out: str | Path) -> int:
    """Files of questions, with the authors' table of which answer names the stereotyped group.

    A question is written as lm-evaluation-harness writes it, with its own three answers (the harness offers ten
    ways to say "unknown"). Questions for which the table gives no target are left out: no answer is the biased one.

    Args:
      metadata: additional_metadata.csv: category, example_id, target_loc (0 to 2).

    Raises:
      UserError: a file of another form, a question that the table does not have, or `out` cannot be written.
    """
    targets = {
        (_get(row, "category", where), _get(row, "example_id", where)): _get(row, "target_loc", where)
        for where, row in _table(metadata)
    }

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for source in sources:
            for where, row in json_rows(str(source), "a question of BBQ"):
                key = (_get(row, "category", where), str(_get(row, "example_id", where)))
                if key not in targets:
                    raise UserError(f"{where}: {metadata} has no {key[0]} {key[1]}; take both from one release")
                if targets[key] not in ("0", "1", "2", *NO_TARGET):
                    raise UserError(f"{metadata}: target_loc={targets[key]!r} of {key[0]} {key[1]} is none of 0, 1, 2")
                if targets[key] not in NO_TARGET:
                    yield where, _question(row, int(targets[key]), where)

    return _write(rows(), out)


def _question(row: Mapping[str, Any], target: int, where: str) -> dict[str, Any]:
    infos = _get(row, "answer_info", where)
    unknown = [i for i in range(3) if infos[f"ans{i}"][1] == "unknown"]
    others = [i for i in range(3) if i not in (target, *unknown)]
    negative = {"neg": True, "nonneg": False}.get(_get(row, "question_polarity", where))
    if len(unknown) != 1 or len(others) != 1 or negative is None:
        raise UserError(f"{where}: target_loc={target}, unknown answers {unknown} and question_polarity="
                        f"{row['question_polarity']!r}; BBQ asks neg or nonneg of one unknown answer and two others")
    return {
        "task": "bbq", "context": f"{_get(row, 'context', where)}\n\nQ: {_get(row, 'question', where)}\nA:",
        "choices": [" " + _get(row, f"ans{i}", where) for i in range(3)], "gold": _get(row, "label", where),
        "biased": target if negative else others[0], "unknown": unknown,
        "condition": _get(row, "context_condition", where), "category": row["category"],
    }


def _get(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, Mapping) or row.get(key) is None:
        held = ", ".join(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise UserError(f"{where}: no {key!r} in {held}; is it the authors' file?")
    return row[key]


def _list(source: str | Path) -> list[Any]:
    with reading(str(source)):
        content = Path(source).read_text(encoding="utf-8")
    try:
        found = json.loads(content)
    except ValueError as error:
        raise UserError(f"{source}: not JSON: {error}") from error
    if not isinstance(found, list):
        raise UserError(f"{source}: a {type(found).__name__}, not a list of questions; take mc_task.json")
    return found


def _table(source: str | Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    with reading(str(source)), open(source, encoding="utf-8", newline="") as file:
        for row in (reader := csv.DictReader(file)):
            yield f"{source}: line {reader.line_num}", row


def _write(rows: Rows, out: str | Path) -> int:
    """Every row is one that `read_items` takes, or nothing is written."""
    out, found = Path(out), []
    for where, row in rows:
        read_item(row, where, "")
        found.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not found:
        raise UserError(f"no question found for {out}; give files that hold some")
    try:
        write_text(out, "".join(found), out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another file") from error
    return len(found)
