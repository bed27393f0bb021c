"""The paper's tables as frames, against numbers that are printed elsewhere in it."""

import json

import numpy as np
import pytest

from spectra_jax import suite as sizes
from spectra_jax.analysis import plots, published, runs
from spectra_jax.analyze import analyze
from spectra_jax.errors import UserError


@pytest.mark.parametrize("name", published.TABLES)
def test_every_table(name):
    title, _ = published.TABLES[name]
    table = published.table(name)
    assert len(table) >= 3 and not table.columns.duplicated().any() and "able" in title or "igure" in title
    allowed = {"benchmarks"}  # Pythia's bits are not the paper's
    assert name in allowed or not table.isna().any().any()


def test_an_unknown_table():
    with pytest.raises(UserError, match="published table='bit' is not one of .*; did you mean bits"):
        published.table("bit")


def test_benchmarks_are_consistent():
    """The six-task average that the paper prints is the mean of the six, but for the BiLM rows; bits are Table 4's."""
    table = published.benchmarks()
    assert len(table["model"].unique()) == 62 and table["value"].notna().all()
    wide = table.assign(key=table["task"] + " " + table["metric"]).pivot(index="model", columns="key", values="value")
    six = wide[["arc_challenge acc_norm", "arc_easy acc_norm", "hellaswag acc_norm", "piqa acc_norm", "boolq acc",
                "winogrande acc"]].mean(axis=1)
    off = (six - wide["commonsense avg6"]).abs()
    assert (off[[not name.startswith("BiLM") for name in off.index]] < 0.15).all()
    bits = table.drop_duplicates("model").set_index("model")["paper_bits"]
    for name, expected in (("TriLM-3.9B", 10.76e9), ("FloatLM-3.9B", 63.83e9), ("QuantLM-1.1B-4bit", 7.00e9)):
        assert bits[name] == pytest.approx(expected, rel=2e-3)
    assert np.isnan(bits["Pythia-1B"])


def test_rows_that_the_paper_speaks_of():
    table = published.benchmarks().set_index(["model", "task", "metric"])["value"]
    assert table["TriLM-3.9B", "lambada", "acc"] == 61.6 and table["FloatLM-99M", "mmlu_avg", "acc"] == 25.3
    assert table["QuantLM-190M-4bit", "lambada", "ppl"] == 72479077.3
    assert table["TriLM-1.1B", "crows_pairs", "stereotype"] == 61.4


def test_the_ablation_in_the_paper_s_order():
    table = published.table("ablation").set_index("model")["commonsense_avg6"]
    arms = ["TriLM", "TriLM only decay removed", "TriLM only peak lowered", "TriLM neither"]
    assert list(table[arms]) == [50.2, 50.1, 49.7, 49.1] and table["TriLM"] > table["BitNet b1.58"]


def test_batches_of_the_suite_follow_from_skipped_tokens():
    """Table 5 against suite.py: tokens over batches are its batch size, for TriLMs within the rounding of the table."""
    table = published.table("loss_scaling").query("family == 'TriLM'")
    sequences = table["skipped_tokens_b"] * 1e9 / table["skipped_batches"] / sizes.CONTEXT
    assert sequences.mean() == pytest.approx(sizes.TRI_BATCH, rel=0.01)


def test_the_figure(tmp_path):
    own = published.benchmarks().query("model == 'TriLM-99M' and metric == 'avg6'").assign(model="mine")
    figure = plots.benchmark(published.benchmarks(), tmp_path / "six.png", own=own)
    assert (tmp_path / "six.png").stat().st_size > 20_000
    assert [text.get_text() for text in figure.axes[1].texts] == ["mine"]
    line = next(line for line in figure.axes[0].lines if line.get_label() == "TriLM")
    assert len(line.get_xdata()) == 9 and line.get_color() == plots.FAMILIES["TriLM"][0]
    with pytest.raises(UserError, match="nothing is published of boolq acc_norm; there is arc_challenge acc, "):
        plots.benchmark(published.benchmarks(), task="boolq", metric="acc_norm")


def test_ones_own_results(tmp_path, suite):
    """What `spectra harness --out` writes, in the units of the paper; the sixfold mean where all six are there."""
    six = {"arc_challenge": ("acc_norm", 0.25), "arc_easy": ("acc_norm", 0.40), "hellaswag": ("acc_norm", 0.30),
           "piqa": ("acc_norm", 0.60), "boolq": ("acc", 0.61), "winogrande": ("acc", 0.50)}
    results = {task: {f"{metric},none": value, f"{metric}_stderr,none": 0.01} for task, (metric, value) in six.items()}
    results["lambada_openai"] = {"perplexity,none": 170.0, "acc,none": 0.2}
    content = {"checkpoint": str(suite / "trilm-16"), "name": "mine", "results": results}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    table = published.own([tmp_path / "mine.json"]).set_index(["task", "metric"])
    assert table.loc[("arc_easy", "acc_norm"), "value"] == 40 and table.loc[("lambada", "ppl"), "value"] == 170
    assert table.loc[("lambada", "acc"), "value"] == pytest.approx(20)
    assert table.loc[("commonsense", "avg6"), "value"] == pytest.approx(100 * np.mean([v for _, v in six.values()]))
    assert set(table["model"]) == {"mine"}
    assert set(table["parameters"]) == {runs.table([suite / "trilm-16"])["parameters"][0]}
    text = analyze("published", [], tmp_path / "out", {"own": [str(tmp_path / "mine.json")]})
    assert "own.csv" in text and (tmp_path / "out" / "benchmark.png").is_file()
    with pytest.raises(UserError, match="mine.json have no triviaqa em; choose another --task and --metric"):
        analyze("published", [], None, {"own": [str(tmp_path / "mine.json")], "task": "triviaqa", "metric": "em"})
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="other.json is no result of `spectra harness --out`"):
        published.own([tmp_path / "other.json"])


def test_the_figure_of_the_laws(tmp_path):
    figure = plots.published_laws({"equation 1": published.EQUATION_1}, tmp_path / "laws.png")
    gap = figure.axes[1].lines[0]
    expected = 100 * (published.EQUATION_1("TriLM", 1e9) / published.EQUATION_1("FloatLM", 1e9) - 1)
    assert np.interp(1e9, gap.get_xdata(), gap.get_ydata()) == pytest.approx(expected, rel=1e-3)
