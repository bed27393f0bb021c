"""Questions answered by log-likelihood: the metrics by hand, a real model against transformers, and bad files."""

import json
import lzma
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers import ROOT, TERNARY, smollm2, spectra, trained
from transformers import AutoModelForCausalLM

from spectra_jax.errors import UserError
from spectra_jax.evaluate.scoring import encode_pairs, score
from spectra_jax.evaluate.tasks import Item, evaluate_tasks, mean_and_error, read_items
from spectra_jax.evaluate.windows import evaluate_texts
from spectra_jax.interop.importing import import_model
from spectra_jax.serve.load import Loaded, load

AGREEMENT = Path(__file__).with_name("agreement.jsonl")
BLANKS = [  # WinoGrande's form, in words of our own
    {"prefixes": ["The cup did not fit the box as the cup", "The cup did not fit the box as the box"],
     "suffix": " was too large.", "gold": 0},
    {"prefixes": ["Anna thanked Ruth because Anna", "Anna thanked Ruth because Ruth"],
     "suffix": " had helped.", "gold": 1},
    {"prefixes": ["The ball broke the glass since the ball", "The ball broke the glass since the glass"],
     "suffix": " was thin.", "gold": 1},
]
LAST_WORDS = [
    {"context": "The king and the", "target": " queen"},
    {"context": "Once upon a", "target": " time"},
    {"context": "The quick brown fox jumps over the lazy", "target": " dog"},
    {"context": "Two plus two is", "target": " purple"},
]


@pytest.fixture(scope="module")
def model() -> Loaded:
    """A trained model on one device."""
    return load(str(trained(*TERNARY)), devices=jax.devices()[:1])


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(model: Loaded, items: list[Item]) -> dict[str, float]:
    """Values and errors of the only task by name."""
    (found,) = evaluate_tasks(model, items)
    return {m.name: m.value for m in found.metrics} | {f"{m.name} error": m.error for m in found.metrics}


def test_the_metrics_by_hand(model):
    """acc and acc_norm from the scores, for items on which they differ."""
    choices = [" a", " of the whale", " naïve ocean (and) a captain"]
    contexts = ["the whale said", "a captain", "1729", "ocean of", "never", "said"]
    items = [Item("t", "choices", tuple((context, c) for c in choices), k % 3) for k, context in enumerate(contexts)]
    acc, normed = [], []
    for item in items:
        sums = np.array([s.loglikelihood for s in score(model, encode_pairs(model.tokenizer, item.pairs))])
        acc.append(float(sums.argmax() == item.gold))
        normed.append(float((sums / [2.0, 13.0, 28.0]).argmax() == item.gold))
    found = metrics(model, items)
    assert (found["acc"], found["acc_norm"]) == (np.mean(acc), np.mean(normed)) and acc != normed
    assert found["acc error"] == pytest.approx(np.std(acc, ddof=1) / math.sqrt(6))


def test_partial_scoring_and_last_words(model, tmp_path):
    blanks = read_items(write(tmp_path / "blanks.jsonl", BLANKS))
    hits = []
    for row in BLANKS:
        scores = score(model, encode_pairs(model.tokenizer, [(prefix, row["suffix"]) for prefix in row["prefixes"]]))
        hits.append(np.argmax([s.loglikelihood for s in scores]) == row["gold"])
    found = metrics(model, blanks)
    assert found["acc"] == np.mean(hits)
    assert "acc_norm" not in found
    words = read_items(write(tmp_path / "words.jsonl", LAST_WORDS))
    scores = score(model, encode_pairs(model.tokenizer, [(row["context"], row["target"]) for row in LAST_WORDS]))
    found, sums = metrics(model, words), np.array([s.loglikelihood for s in scores])
    assert found["perplexity"] == pytest.approx(math.exp(-sums.mean()))
    assert found["perplexity error"] == pytest.approx(found["perplexity"] * sums.std(ddof=1) / 2)
    assert found["acc"] == np.mean([s.greedy for s in scores])
    assert mean_and_error([0.5])[0] == 0.5 and math.isnan(mean_and_error([0.5])[1])


def test_files(tmp_path):
    """Tasks by name or by file, several kinds in one, compressed; the limit counts per task."""
    path = tmp_path / "mixed.jsonl.xz"
    rows = [{"task": "named", **BLANKS[0]}, *LAST_WORDS, *BLANKS[1:]]
    path.write_bytes(lzma.compress("\n".join(json.dumps(row) for row in rows).encode()))
    items = read_items(path)
    assert [(item.task, item.kind) for item in items] == [
        ("named", "suffix"), *[("mixed", "target")] * 4, *[("mixed", "suffix")] * 2
    ]
    assert len(read_items(path, limit=1)) == 3 and len(read_items(AGREEMENT)) == 24


def test_the_command(model):
    done = spectra("evaluate", f"--checkpoint={trained(*TERNARY)}", "--tasks", str(AGREEMENT), "--limit=8")
    assert done.returncode == 0, done.stderr
    title, head, first, second = done.stdout.splitlines()
    assert title == "FloatLM run, step 12" and head.split() == ["task", "items", "metric", "value"]
    found = metrics(model, read_items(AGREEMENT, limit=8))
    assert first.split()[:3] == ["agreement", "8", "acc"] and second.split()[2] == "acc_norm"
    assert (float(first.split()[3]), float(second.split()[3])) == (found["acc"], found["acc_norm"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a"', "line 2: not JSON: .*; each line holds one object"),
        ("[1]", "line 2: a list, not an item: {context, choices, gold}; .*; each line holds one object"),
        ('{"question": "a", "answers": ["b"]}', "line 2: the keys question, answers are no item; it needs {context, "),
        ('{"choices": ["a", "b"], "gold": 0}', "line 2: no 'context'; an item with 'choices' needs context, choice"),
        ('{"prefixes": ["a", "b"], "suffix": "c"}', "line 2: no 'gold'; an item with 'suffix' needs"),
        ('{"context": "a", "choices": ["b", "c"], "gold": 2}', "line 2: gold=2 is not one of the 2 answers; .* 0 to 1"),
        ('{"context": "a", "choices": ["b", "c"], "gold": true}', "line 2: gold=True is not one of the 2 answers"),
        ('{"context": "a", "choices": [], "gold": 0}', "line 2: 'choices' holds 0 of them; a question needs a list of"),
        ('{"context": "a", "choices": "bc", "gold": 0}', "line 2: 'choices' holds a str; a question needs a list of"),
        ('{"context": "a", "choices": ["b", ""], "gold": 0}', "line 2: 'choices' holds an empty string"),
        ('{"context": 5, "target": "b"}', "line 2: 'context' holds a int, not a string"),
        ('{"context": "a", "target": ""}', "line 2: 'target' holds an empty string, which has no likelihood"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(LAST_WORDS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match="bad.jsonl: " + message):
        read_items(path)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl holds no item; a line holds one of {context, choices, gold}"):
        read_items(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="--limit=0 leaves no item; ask for at least 1"):
        read_items(AGREEMENT, limit=0)


@pytest.mark.slow
@pytest.mark.skipif("SPECTRA_OFFLINE" in os.environ, reason="SPECTRA_OFFLINE is set, and this downloads 93 MB once")
def test_a_real_model_against_transformers(tmp_path):
    """SmolLM2: log-likelihoods, greediness and the perplexity of a shipped text, pair by pair in transformers."""
    path = smollm2()
    model = load(str(import_model(path, tmp_path / "run")), devices=jax.devices()[:1])
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def encoded(text: str) -> list[int]:
        return model.tokenizer.encode_batch([text])[0].tolist()

    def expected(pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        """In one padded batch, for torch's small products are slow; what is to the right of a text is never seen."""
        ids = [encoded(context + continuation) for context, continuation in pairs]
        batch = torch.tensor([row + [0] * (max(map(len, ids)) - len(row)) for row in ids])
        with torch.no_grad():
            logp = theirs(batch).logits.log_softmax(-1)
        found = []
        for (context, _), row, z in zip(pairs, ids, logp):
            cut = len(encoded(context))
            z, targets = z[cut - 1 : len(row) - 1], torch.tensor(row[cut:])
            found.append((z[range(len(targets)), targets].sum().item(), bool((z.argmax(-1) == targets).all())))
        return found

    # Of the kinds of pairs, those whose contexts neither end in a space nor are empty: transformers has no rule there.
    two = [item for item in read_items(AGREEMENT) if item.pairs[0][0][-1:].strip() and len(item.pairs) == 2]
    items = two + [
        item for name, rows in {"blanks": BLANKS, "words": LAST_WORDS}.items()
        for item in read_items(write(tmp_path / f"{name}.jsonl", rows))
    ]
    pairs = [pair for item in items for pair in item.pairs]
    found, wanted = score(model, encode_pairs(model.tokenizer, pairs)), expected(pairs)
    np.testing.assert_allclose([s.loglikelihood for s in found], [w[0] for w in wanted], rtol=1e-3, atol=2e-3)
    assert [s.greedy for s in found] == [w[1] for w in wanted]
    first = np.argmax(np.reshape([w[0] for w in wanted[: 2 * len(two)]], (-1, 2)), axis=1)
    assert metrics(model, two)["acc"] == np.mean(first == [item.gold for item in two]) > 0.7  # it knows English

    with lzma.open(ROOT / "spectra_jax" / "data" / "corpus" / "corpus.txt.xz", "rt", encoding="utf-8") as file:
        text = file.read(1000)
    ids = encoded(text)
    with torch.no_grad():
        logp = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    loss = -logp[range(len(ids) - 1), torch.tensor(ids[1:])].mean().item()
    quality = evaluate_texts(model, [text])
    assert (quality.tokens, quality.loss) == (len(ids) - 1, pytest.approx(loss, rel=1e-4))
