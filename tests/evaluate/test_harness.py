"""lm-evaluation-harness on our models: against our own scoring, and against its own model on transformers."""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import lm_eval
import numpy as np
import pytest
from helpers import SCRATCH, TERNARY, texts, trained
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from spectra_jax import cli
from spectra_jax.errors import UserError
from spectra_jax.evaluate.adapter import SpectraLM
from spectra_jax.evaluate.harness import evaluate_harness, table
from spectra_jax.evaluate.published import PAPER, SIX, average, models, published
from spectra_jax.evaluate.scoring import encode_pairs, score
from spectra_jax.evaluate.tasks import evaluate_tasks, read_items
from spectra_jax.evaluate.windows import evaluate_texts, window_pairs
from spectra_jax.interop import hf
from spectra_jax.interop.importing import import_model
from spectra_jax.serve.load import load

AGREEMENT = Path(__file__).with_name("agreement.jsonl")
PAIRS = [
    ("the whale said", " never"), ("the whale said ", "never"), ("the whale said", " (and)"), ("", "a captain"),
    ("a captain\n", "of the ocean"), ("naïve", " 1729"), ("the whale said", " never slept"),
    ("x" * 60, " of the whale"),
]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    """What the harness hands to a model."""
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder() -> Path:
    """A trained TriLM as transformers load it, with a context of 64, so that the items fit."""
    folder = hf.export(str(trained(*TERNARY)), SCRATCH / "harness-export")
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        content = json.loads((folder / name).read_text()) | {key: 64}
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def run(folder) -> str:
    """The same model as a run of ours."""
    return str(import_model(folder, SCRATCH / "harness-run", weight="ternary"))


@pytest.fixture(scope="module")
def ours(run) -> SpectraLM:
    """Our model in the harness."""
    return SpectraLM(load(run, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def theirs(folder) -> HFLM:
    """Its weights as transformers run them, in the harness's own wrapper."""
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A folder of tasks: the same questions as multiple choice, their texts for perplexity, and a generation."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [json.loads(line) for line in AGREEMENT.read_text().splitlines()]
    words = [
        {"context": " ".join(text.split()[:n]), "target": " " + text.split()[n]}
        for text in texts(20, seed=6) for n in range(3, 20)
    ]
    whole = [{"text": text} for text in texts(5, seed=9)]
    for name, rows in {"agreement": questions, "words": words, "whole": whole}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name: str, data: str, kind: str, metrics: list[str], **more) -> None:
        (folder / f"{name}.yaml").write_text(json.dumps({
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / data)}},
            "test_split": "test", "output_type": kind, "target_delimiter": "",
            "metric_list": [{"metric": metric} for metric in metrics], **more,
        }))

    task("local_agreement", "agreement.jsonl", "multiple_choice", ["acc", "acc_norm"],
         doc_to_text="{{context}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}")
    task("local_words", "words.jsonl", "loglikelihood", ["perplexity", "acc"],
         doc_to_text="{{context}}", doc_to_target="{{target}}")
    task("local_whole", "whole.jsonl", "loglikelihood_rolling", ["bits_per_byte"], doc_to_text="",
         doc_to_target="{{text}}")
    task("local_answers", "words.jsonl", "generate_until", ["exact_match"], doc_to_text="{{context}}",
         doc_to_target="{{target}}", generation_kwargs={"until": [" of"], "max_gen_toks": 4, "do_sample": False})
    task("local_lost", "nowhere.jsonl", "multiple_choice", ["acc"])
    return folder


def test_our_own_scoring_agrees_to_the_last_digit(run, local, tmp_path):
    """The command runs three kinds of tasks; `spectra evaluate` has no code in common but the scoring of token ids."""
    out = tmp_path / "found.json"
    cli.run([
        "harness", f"--checkpoint={run}", "--tasks=local_agreement,local_words,local_whole", f"--include={local}",
        f"--out={out}",
    ])
    told = json.loads(out.read_text())
    assert (told["family"], told["step"], told["lm_eval"]) == ("TriLM", 0, version("lm_eval"))
    found, model = told["results"], load(run)
    items = read_items(local / "agreement.jsonl") + read_items(local / "words.jsonl")  # the same batches
    questions, words = ({m.name: m for m in task.metrics} for task in evaluate_tasks(model, items))
    for task, metrics in (("local_agreement", questions), ("local_words", words)):
        for name, metric in metrics.items():
            assert found[task][f"{name},none"] == metric.value, (task, name)
            if name != "perplexity":  # its error there is a bootstrap's
                assert found[task][f"{name}_stderr,none"] == pytest.approx(metric.error, rel=1e-12)
    errors = found["local_words"]["perplexity_stderr,none"], words["perplexity"].error
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
    whole = [json.loads(line)["text"] for line in (local / "whole.jsonl").read_text().splitlines()]
    ids = [[model.tokenizer.eod, *ids.tolist()] for ids in model.tokenizer.encode_batch(whole)]
    nats = -sum(s.loglikelihood for s in score(model, [pair for one in ids for pair in window_pairs(one, 64, 64)]))
    bits = nats / math.log(2) / sum(len(text.encode()) for text in whole)
    assert found["local_whole"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-14)


def test_the_table_of_the_command(run, local, capsys):
    cli.run(["harness", f"--checkpoint={run}", "--tasks=local_agreement", f"--include={local}", "--limit=6"])
    title, head, acc, normed = capsys.readouterr().out.splitlines()[-4:]
    assert title.startswith("TriLM harness-export, step 0, lm-evaluation-harness 0.4.")
    assert head.split() == ["task", "metric", "value"] and acc.split()[:2] == ["local_agreement", "acc"]
    (expected,) = evaluate_tasks(load(run), read_items(AGREEMENT, limit=6))
    assert [float(row.split()[2]) for row in (acc, normed)] == [round(m.value, 4) for m in expected.metrics]
    assert float(acc.split()[4]) == round(expected.metrics[0].error, 4)


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (40, 10), (7, 1)])
def test_windows_are_the_harness_s(ours, theirs, context, stride):
    """Its windows with so much overlap, and the perplexity of texts when transformers predict them."""
    def windows(ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Of the harness, after the first token."""
        rolled = utils.get_rolling_token_windows(ids[1:], ids[0], context, context - stride + 1)
        return [utils.make_disjoint_window(window) for window in rolled]

    for n in (2, 3, context, context + 1, context + 2, 2 * context + 1, 300):
        assert window_pairs(list(range(n)), context, stride) == windows(list(range(n)))
    documents = [*texts(2, seed=7), " ".join(texts(5, seed=8))]
    some = [window for text in documents for window in windows(ours.tok_encode(text))]
    total = -sum(found for found, _ in theirs._loglikelihood_tokens([(None, *window) for window in some]))
    quality = evaluate_texts(ours.loaded, documents, context=context, stride=stride)
    assert quality.tokens == sum(len(ours.tok_encode(text)) - 1 for text in documents)
    assert quality.loss == pytest.approx(total / quality.tokens, rel=1e-5)


def test_rolling_windows_coincide(ours):
    """A rolling log-likelihood is the sum over our own windows after one end of document, to the last digit."""
    documents = [*texts(2, seed=7), " ".join(texts(5, seed=8))]
    sums = ours.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in documents]))
    pairs = [window_pairs([ours.eot_token_id, *ours.tok_encode(text)], 64, 64) for text in documents]
    assert max(len(some) for some in pairs) > 1
    scores = iter(score(ours.loaded, [pair for some in pairs for pair in some]))
    assert sums == [sum(next(scores).loglikelihood for _ in some) for some in pairs]


def test_where_texts_are_cut(ours, theirs):
    """Our rule for contexts and continuations against the harness's, with its tokenizer and with ours."""
    pairs = PAIRS + [(text[:n], text[n:]) for text in texts(6, seed=2) for n in range(1, 60, 7)]
    for (context, rest), found in zip(pairs, encode_pairs(ours.loaded.tokenizer, pairs)):
        if context.strip():
            assert found == ours._encode_pair(context, rest) == theirs._encode_pair(context, rest)
        else:
            assert found == ([ours.eot_token_id], theirs.tok_encode(context + rest))


def test_against_transformers(ours, theirs):
    """Log-likelihoods, greediness, rolling sums and greedy generations; among the contexts some that are cut."""
    whole = texts(8, seed=3)
    arguments = PAIRS + [(text[: text.rindex(" ")], text[text.rindex(" ") :]) for text in whole]
    assert any(len(ours.tok_encode(a + b)) > 65 for a, b in arguments)
    found, wanted = (lm.loglikelihood(requests("loglikelihood", arguments)) for lm in (ours, theirs))
    np.testing.assert_allclose([f[0] for f in found], [w[0] for w in wanted], rtol=1e-4)
    assert [f[1] for f in found] == [w[1] for w in wanted]
    documents = [(text,) for text in texts(4, seed=4)]
    found, wanted = (lm.loglikelihood_rolling(requests("rolling", documents)) for lm in (ours, theirs))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    options = {"until": [" of", "q"], "max_gen_toks": 12, "do_sample": False}
    prompts = [(text[: 20 + 30 * k], dict(options)) for k, text in enumerate(texts(6, seed=5))]
    found, wanted = (lm.generate_until(requests("generate_until", prompts)) for lm in (ours, theirs))
    assert found == wanted and any(found)


def test_the_same_answers_as_transformers(ours, theirs, local):
    """A whole run of the harness over both: accuracies, and what is generated."""
    manager = TaskManager(include_path=str(local), include_defaults=False)
    found, wanted = (
        lm_eval.simple_evaluate(
            lm, tasks=["local_agreement", "local_answers"], task_manager=manager, limit=24, bootstrap_iters=0
        )
        for lm in (ours, theirs)
    )
    assert found["results"]["local_agreement"]["acc,none"] == wanted["results"]["local_agreement"]["acc,none"]
    assert found["results"]["local_agreement"]["acc_norm,none"] == wanted["results"]["local_agreement"]["acc_norm,none"]
    told, expected = ([sample["resps"] for sample in f["samples"]["local_answers"]] for f in (found, wanted))
    assert told == expected and len({str(answer) for answer in told}) > 1


def test_generations(ours, run):
    """Stops, lengths and sampling."""
    prompt = "the whale said"

    def told(**options) -> str:
        return ours.generate_until(requests("generate_until", [(prompt, options)]))[0]

    plain = told(max_gen_toks=12)
    assert 4 < len(plain) and told(max_gen_toks=12, until=plain[3:5]) == plain[: plain.index(plain[3:5])]
    (spread,) = SpectraLM(load(run)).generate_until(requests("generate_until", [(prompt, {"max_gen_toks": 12})]))
    assert spread == plain  # on all devices
    drawn = {told(max_gen_toks=12, do_sample=True, temperature=5.0)}
    other = SpectraLM(ours.loaded, seed=1).generate_until(
        requests("generate_until", [(prompt, {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0})]))
    assert drawn == {told(max_gen_toks=12, do_sample=True, temperature=5.0)} and other[0] not in drawn | {plain}
    with pytest.raises(UserError, match="generation_kwargs.top_k=3 is not known here; a task may set do_sample"):
        told(do_sample=True, top_k=3)
    with pytest.raises(UserError, match="256 new tokens leave no room for a prompt in the model's context of 64"):
        told()
    with pytest.raises(UserError, match="temperature=-1.0 must not be negative"):
        told(max_gen_toks=4, do_sample=True, temperature=-1.0)


def test_published_results():
    """The paper's own averages follow from its values, but for the BiLMs; and they stand beside ours."""
    assert len(models()) == 62 and len(PAPER) == 13 and {task for task, _ in SIX} < set(PAPER)
    for name, row in models().items():
        if not name.startswith(("BiLM", "Pythia")):
            assert 100 * average(published(name)) == pytest.approx(float(row["commonsense_avg6"]), abs=0.07), name
    other = published("trilm-1.1b")
    assert other["arc_easy", "acc_norm"] == 0.498 and other["lambada_openai", "perplexity"] == 17.3
    results = {task: {f"{metric},none": 0.5, f"{metric}_stderr,none": 0.1} for task, metric in SIX}
    *rows, mean = table(results, other, "TriLM-1.1B")
    assert rows[0].split() == ["task", "metric", "value", "TriLM-1.1B"]
    assert rows[1].split() == ["arc_challenge", "acc_norm", "0.5000", "+-", "0.1000", "0.2650"]
    assert mean.split()[-2:] == ["0.5000", f"{average(other):.4f}"] and average({}) is None
    assert table({"x": {"acc,none": 1, "acc_stderr,none": "N/A"}})[1].split() == ["x", "acc", "1.0000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["local_agrement"]}, "unknown task 'local_agrement' among [0-9,]+; did you mean local_agreement?"),
        ({"tasks": ["local_lost"]}, "the data of local_lost cannot be loaded: .*nowhere.jsonl"),
        ({"include": "nowhere"}, "--include=nowhere is no folder"),
        ({"out": "nowhere/a.json"}, "--out=nowhere/a.json: there is no folder"),
        ({"limit": 0}, "--limit=0 leaves no item"),
        ({"beside": "TriLM-1.2B"}, "--beside=TriLM-1.2B is none of the 62 published models; did you mean TriLM-1"),
    ],
)
def test_what_cannot_be_run(run, local, options, message):
    with pytest.raises(UserError, match=message):
        evaluate_harness(run, **{"tasks": ["local_agreement"], "include": str(local)} | options)


def test_without_the_harness(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm-evaluation-harness is not installed; .*install 'spectra_jax\[harness\]'"):
        evaluate_harness(run, ["paper"])


def test_the_names_of_the_paper():
    assert set(PAPER) <= set(TaskManager().all_tasks)
