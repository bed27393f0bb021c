"""The paper's thirteen tasks and its published results, to stand beside one's own.

`published.csv` holds Spectra's tables 6, 7, 9, 12 and 13 (arXiv 2407.12327): per cent, but for LAMBADA's perplexity;
`commonsense_avg6` is the paper's average, which for the three BiLMs is not the mean of the six values that it names.
The paper ran lm-evaluation-harness 0.4.2 without examples in the prompt.
"""

import csv
import difflib
from collections.abc import Mapping
from pathlib import Path

from spectra_jax.errors import UserError

PAPER = (
    "arc_easy", "arc_challenge", "hellaswag", "boolq", "piqa", "winogrande", "lambada_openai", "sciq", "logiqa",
    "mmlu_continuation", "triviaqa", "crows_pairs_english", "truthfulqa_mc1",
)
# (task, metric) in lm-evaluation-harness -> column of published.csv.
COLUMNS = {
    (task, metric): f"{task}_{metric}"
    for task in ("arc_challenge", "arc_easy", "hellaswag", "piqa", "sciq", "logiqa") for metric in ("acc_norm", "acc")
} | {
    ("boolq", "acc"): "boolq_acc",
    ("winogrande", "acc"): "winogrande_acc",
    ("lambada_openai", "perplexity"): "lambada_ppl",
    ("lambada_openai", "acc"): "lambada_acc",
    ("triviaqa", "exact_match"): "triviaqa_em",
    ("crows_pairs_english", "likelihood_diff"): "crows_pairs_diff",
    ("crows_pairs_english", "pct_stereotype"): "crows_pairs_stereotype",
    ("truthfulqa_mc1", "acc"): "truthfulqa_mc1_acc",
    ("mmlu_continuation", "acc"): "mmlu_avg",
}
# The average that the paper plots: commonsense and reading.
SIX = (
    ("arc_challenge", "acc_norm"), ("arc_easy", "acc_norm"), ("hellaswag", "acc_norm"), ("piqa", "acc_norm"),
    ("boolq", "acc"), ("winogrande", "acc"),
)


def models() -> dict[str, dict[str, str]]:
    """Rows of the table by name: FloatLM-99M, TriLM-1.1B, QuantLM-1.1B-4bit, ..."""
    with Path(__file__).with_name("published.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ends = {"QuantLM": lambda bits: f"-{int(float(bits))}bit"}
    return {f"{row['family']}-{row['size']}{ends.get(row['family'], lambda _: '')(row['bits'])}": row for row in rows}


def published(name: str) -> dict[tuple[str, str], float]:
    """The results of one model by (task, metric), as fractions (perplexity: as it is).

    Raises:
      UserError: there is no such model; the message names the nearest.
    """
    rows = models()
    row = next((row for key, row in rows.items() if key.lower() == name.lower()), None)
    if row is None:
        near = difflib.get_close_matches(name, rows, n=1, cutoff=0.3) or ["TriLM-1.1B"]
        raise UserError(f"--beside={name} is none of the {len(rows)} published models; did you mean {near[0]}?")
    unit = {"lambada_ppl": 1.0}  # the rest is printed times 100
    return {key: float(row[name]) / unit.get(name, 100.0) for key, name in COLUMNS.items() if row[name]}


def average(values: Mapping[tuple[str, str], float]) -> float | None:
    """The mean of the paper's six, where all are there."""
    found = [values[key] for key in SIX if key in values]
    return sum(found) / len(SIX) if len(found) == len(SIX) else None
