"""The three axes of runs: by the command on three checkpoints; bytes and ranks by hand and by scipy; bad input."""

import itertools
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, TERNARY, copy_of, spectra, texts, tiny, trained
from scipy import stats

from spectra_jax.analysis import axes, plots, runs
from spectra_jax.analysis.ranks import correlations, rank_correlation
from spectra_jax.analysis.sizes import bytes_per_token
from spectra_jax.analyze import analyze
from spectra_jax.cli import run
from spectra_jax.errors import UserError
from spectra_jax.evaluate.tasks import evaluate_tasks, read_items
from spectra_jax.evaluate.windows import evaluate_texts
from spectra_jax.model.parameters import freeze, init_parameters
from spectra_jax.report import report
from spectra_jax.serve.generate import Generator
from spectra_jax.serve.load import load

QUESTIONS = ROOT / "tests" / "evaluate"
STEPS = (4, 8, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of a TriLM whose checkpoints of three steps stand for three models, and two files to measure them on."""
    where = tmp_path_factory.mktemp("axes")
    (where / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(8, seed=3)))
    (where / "words.jsonl").write_text("".join(
        json.dumps({"context": " ".join(text.split()[:n]), "target": " " + text.split()[n]}) + "\n"
        for text in texts(6, seed=4) for n in range(2, 12)))
    return copy_of(trained(*TERNARY), where / "tri")


@pytest.fixture(scope="module")
def measured(folder) -> tuple[str, float]:
    """What the command printed, and its seconds; in a process with one device."""
    started, parent = time.perf_counter(), folder.parent
    done = spectra(
        "analyze", "axes", *(f"{folder}@{step}" for step in STEPS), "--texts", str(parent / "held_out.jsonl"),
        "--tasks", str(parent / "words.jsonl"), "--alignment", str(QUESTIONS / "alignment.jsonl"),
        f"--out={parent / 'out'}", "--weights=packed",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - started


def test_the_command(folder, measured):
    text, seconds = measured
    out = folder.parent / "out"
    assert {path.name for path in out.iterdir()} == {
        "axes.csv", "capacity.csv", "alignment.csv", "efficiency.csv", "rank_correlation.csv", "task_against_text.png"}
    values = pd.read_csv(out / "axes.csv")
    assert list(values["run"].unique()) == [f"tri@{step}" for step in STEPS] and set(values["family"]) == {"FloatLM"}
    assert values.groupby("axis")["metric"].nunique().to_dict() == {"alignment": 8, "capacity": 3, "efficiency": 6}
    wide = pd.read_csv(out / "efficiency.csv").set_index("run")
    assert (wide.filter(like="of first").iloc[0] == 1).all()
    assert wide["stored_bits"].tolist() == [runs.table([folder])["stored_bits"][0]] * 3
    assert (wide["tokens_per_second"] > 0).all() and wide["measured on"].str.match(r"1 x cpu \(\d+ cores\)").all()
    assert not wide["measured on"].str.contains("dense").any(), "packed products"
    rate = wide["tokens_per_second of first"] * wide["tokens_per_second"].iloc[0]
    assert np.allclose(rate, wide["tokens_per_second"], rtol=1e-5)
    # A prompt of 4 and 13 new tokens in a context of 16; the first of these is the prompt's.
    assert (axes.ROUNDS * 12 / wide["tokens_per_second"]).sum() < seconds
    for part in ("Capacity, alignment, efficiency", "3 models", "rank_correlation", "tokens_per_second of first"):
        assert part in text


def test_values_are_those_of_evaluation(folder, measured):
    """Perplexity and metrics as `evaluate_texts` and `evaluate_tasks` give them here, with their errors."""
    values = axes.table([f"{folder}@{step}" for step in STEPS])
    model = load(f"{folder}@8", devices=jax.devices()[:1])
    of = values[values["run"] == "tri@8"].set_index(["of", "metric"])
    q = evaluate_texts(model, texts(8, seed=3))
    assert of.loc[("held_out.jsonl", "perplexity"), "value"] == pytest.approx(q.perplexity, rel=1e-5)
    assert of.loc[("held_out.jsonl", "bits_per_byte"), "error"] == pytest.approx(q.bits_per_byte_error, rel=1e-4)
    assert of.loc[("held_out.jsonl", "perplexity"), "items"] == q.tokens
    items = [*read_items(folder.parent / "words.jsonl"), *read_items(QUESTIONS / "alignment.jsonl")]
    found = {task.task: task for task in evaluate_tasks(model, items)}
    assert set(found) == {"words", "true", "pairs", "bias"}
    for name, task in found.items():
        for metric in task.metrics:
            row = of.loc[(name, metric.name)]
            assert row["axis"] == ("capacity" if name == "words" else "alignment")
            assert (row["value"], row["error"]) == pytest.approx((metric.value, metric.error), rel=1e-4, nan_ok=True)
            assert row["items"] == task.items
    ranks = correlations(values)
    assert (ranks["models"] == 3).all() and set(ranks["of"]) == {"words", "true", "pairs", "bias"}
    word = ranks[ranks["metric"] == "perplexity"].iloc[0]
    table = values.pivot_table(index="run", columns=["of", "metric"], values="value")
    x, y = table[("held_out.jsonl", "bits_per_byte")], table[("words", "perplexity")]
    assert word["kendall"] == pytest.approx(stats.kendalltau(x, y).statistic)


def test_measuring_adds_to_what_is_there(folder, measured, tmp_path):
    """Another text later; the same one again takes the place of the old values; other steps stay."""
    copied = copy_of(folder, tmp_path / "tri")
    before = json.loads((copied / axes.FILE).read_text())
    kept = [row for row in before["12"] if row["axis"] != "efficiency"]
    (tmp_path / "more.txt").write_text("the whale said never")
    axes.measure([copied], texts=[tmp_path / "more.txt"])
    after = json.loads((copied / axes.FILE).read_text())
    assert after["4"] == before["4"] and [row for row in after["12"] if row["of"] not in ("more.txt", "model")] == kept
    values = axes.table([copied])
    assert values["of"].value_counts()["more.txt"] == 2 and values["of"].value_counts()["model"] == 6
    speeds = values[values["metric"] == "tokens_per_second"]
    assert speeds["on"].str.startswith("8 x cpu").all() and speeds["on"].str.contains("8 x 13 tokens").all()
    # Measured differently, a speed is not compared.
    wide = axes.along(axes.table([f"{copied}@4", copied]), "efficiency").set_index("run")
    assert np.isnan(wide.loc["tri", "tokens_per_second of first"]) and wide.loc["tri", "stored_bits of first"] == 1
    # The other text is of one model only.
    ranks = correlations(axes.table([f"{copied}@4", f"{copied}@8", copied])).set_index("text")
    assert set(ranks.loc["more.txt", "note"]) == {"fewer than 3 models"} and set(ranks.loc["more.txt", "models"]) == {1}


def test_in_the_report_where_there_is_something(folder, measured, tmp_path):
    report([str(folder)], tmp_path / "with.html")
    text = (tmp_path / "with.html").read_text()
    assert '<h2>Capacity, alignment, efficiency</h2>' in text and "tokens_per_second of first" in text
    assert "fewer than 3 models" in text
    assert not axes.is_measured(trained(*TERNARY)), "else other reports would have it too"


@pytest.mark.parametrize("weight", ["float", "ternary"])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_token(weight, tied):
    """By hand from the shapes: D 32, F 64, two layers, 4 query and 2 key-value heads of 8, V 304, T 16."""
    config = tiny(f"model.weight={weight}", f"model.tie_embeddings={tied}")
    like = jax.eval_shape(partial(init_parameters, config.model), jax.random.key(0))
    found = bytes_per_token(config, jax.eval_shape(partial(freeze, config.model), like))
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    bits = matrices * 16 if weight == "float" else 2 * matrices + 32 * 14  # a scale for each
    gains = 16 * 5 * 32
    table = 16 * 304 * 32
    assert found["weight_bytes_per_token"] == (bits + gains + table + (0 if tied else 16 * 32)) / 8
    assert found["cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 2 * 8
    assert found["bytes_per_token"] == found["weight_bytes_per_token"] + found["cache_bytes_per_token"]


def test_a_document_that_ends_at_once_is_timed_all_the_same():
    """All logits are equal, and the likeliest token is the first, which ends the document."""
    model = load(str(trained(*TERNARY)), devices=jax.devices()[:1])
    assert model.tokenizer.eod == 0
    model = replace(model, parameters={**model.parameters, "head": model.parameters["head"] * 0})
    (ended,) = Generator(model).generate([[5, 6]], max_new_tokens=8, temperature=0)
    assert ended.reason == "end" and not ended.tokens
    (row,) = axes._speed(model, "dense")
    assert math.isfinite(row["value"]) and row["value"] > 0 and model.tokenizer.eod == 0


# Ranks


@pytest.mark.parametrize("n", range(3, 8))
def test_p_values_over_all_orders(n):
    """Coefficients by scipy, p-values by its exact test (Kendall) and by going through all orders (Spearman)."""
    x, y = np.random.default_rng(n).normal(size=(2, n))
    found = rank_correlation(x, y)
    kendall = stats.kendalltau(x, y, method="exact")
    assert (found["kendall"], found["kendall_p"]) == pytest.approx((kendall.statistic, kendall.pvalue), rel=1e-12)
    a, b = stats.rankdata(x), stats.rankdata(y)
    rhos = [1 - 6 * ((np.array(order) - b) ** 2).sum() / (n * (n**2 - 1)) for order in itertools.permutations(a)]
    rho = 1 - 6 * ((a - b) ** 2).sum() / (n * (n**2 - 1))
    assert found["spearman"] == pytest.approx(rho, rel=1e-12)
    assert found["spearman_p"] == pytest.approx(np.mean(np.abs(rhos) >= abs(rho) - 1e-9), rel=1e-12)
    assert found["kendall_p"] >= 2 / math.factorial(n) and found["note"] == ""


def test_many_models_and_ties():
    x, y = np.random.default_rng(1).normal(size=(2, 30))
    y = y + 0.4 * x
    found = rank_correlation(x, y)
    assert found["spearman_p"] == pytest.approx(stats.spearmanr(x, y).pvalue, abs=0.01)
    assert found["kendall_p"] == pytest.approx(stats.kendalltau(x, y).pvalue, abs=0.01)
    tied = rank_correlation(np.array([1.0, 1.0, 2.0, 3.0]), np.array([4.0, 5.0, 5.0, 6.0]))
    # tau-b by its formula: 4 concordant pairs, none discordant, one tie in each.
    assert tied["kendall"] == pytest.approx(4 / math.sqrt(5 * 5))
    assert tied["spearman"] == pytest.approx(np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1])


def frame(scores: dict[str, list[float]]) -> pd.DataFrame:
    """Values of models m0, m1, ... as a table of axes; NaN where a model was not asked."""
    rows = []
    for name, values in scores.items():
        axis, of, metric = name.split()
        rows += [{"run": f"m{i}", "family": "TriLM", "axis": axis, "of": of, "metric": metric, "value": value,
                  "error": 0.1, "items": 10, "on": "x"} for i, value in enumerate(values) if value == value]
    return pd.DataFrame(rows)


def test_what_ranks_cannot_say_is_marked(tmp_path):
    nan = math.nan
    values = frame({
        "capacity wiki bits_per_byte": [1.0, 1.2, 1.4, 1.6], "capacity wiki perplexity": [9, 10, 11, 12],
        "capacity arc acc": [0.5, 0.4, 0.3, 0.2], "capacity coin acc": [0.5] * 4,
        "alignment bbq acc": [0.1, 0.2, nan, nan],
        "efficiency model stored_bits": [4, 3, 2, 1],
    })
    found = correlations(values).set_index("of")
    assert list(found.index) == ["arc", "coin", "bbq"] and list(found["models"]) == [4, 4, 2]
    assert (found.loc["arc", "spearman"], found.loc["arc", "kendall"]) == (pytest.approx(-1), pytest.approx(-1))
    assert found.loc["arc", "spearman_p"] == pytest.approx(2 / 24)
    assert list(found["note"]) == ["", "all alike", "fewer than 3 models"]
    assert found.loc[["coin", "bbq"], ["spearman", "spearman_p", "kendall", "kendall_p"]].isna().all(axis=None)
    figure = plots.against_text(values, found.reset_index(), tmp_path / "ranks.png")
    titles = [one.get_title() for one in figure.axes if one.get_visible()]
    assert titles == ["arc: rho -1.00, tau -1.00", "coin: all alike", "bbq: fewer than 3 models"]
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    empty = correlations(frame({"capacity arc acc": [0.5, 0.4, 0.3]}))
    assert empty.empty
    with pytest.raises(UserError, match="no text with tasks to draw against it; measure --texts and --tasks"):
        plots.against_text(values, empty)


# Bad input


def test_bad_input(folder, measured, tmp_path):
    plain, held_out = str(trained(*TERNARY)), str(folder.parent / "held_out.jsonl")
    words = str(folder.parent / "words.jsonl")
    for arguments, message in (
        ([], "no runs are named"),
        ([plain], "nothing was measured of these runs; name --texts, --tasks or --alignment"),
        ([plain, "--tasks", words, "--alignment", words], "words: twice among --texts, --tasks and --alignment"),
        ([plain, "--tasks", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
        ([plain, "--tasks", held_out], "line 1: the keys text are no item"),
        ([plain, "--tasks", words, "--limit=0"], "--limit=0 leaves no item"),
        ([str(tmp_path)], "holds no run and no rows"),
        ([str(folder), "--metric=acc"], "--metric is not an option of the analysis 'axes'; it has --texts, --tasks"),
    ):
        with pytest.raises(UserError, match=message):
            run(["analyze", "axes", *arguments])
    assert not (Path(plain) / axes.FILE).exists()


def test_bad_records(folder, measured, tmp_path):
    copied = copy_of(folder, tmp_path / "other")
    changed = json.loads((copied / axes.FILE).read_text())
    for row in changed["12"]:
        row["on"] = row["on"] if row["of"] != "bias" else "0"
    (copied / axes.FILE).write_text(json.dumps(changed))
    with pytest.raises(UserError, match="bias: tri and other were measured on different content; measure both in one"):
        axes.table([folder, copied])
    (copied / axes.FILE).write_text("{")
    with pytest.raises(UserError, match="axes.json is damaged: .*; delete it and measure again"):
        analyze("axes", [str(copied)])
    (copied / axes.FILE).unlink()
    (copied / axes.FILE).mkdir()
    with pytest.raises(UserError, match="cannot write .*axes.json: .*; measure a copy of the run"):
        axes._keep(copied, 12, [])
    assert not axes.is_measured(copied)
