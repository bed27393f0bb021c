"""Gaps, their errors and trends by hand and by scipy; labels; laws of a suite; the best width for so many bits."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import data, tiny
from scipy import stats

from spectra_jax.analysis import comparison, plots, runs
from spectra_jax.analysis.scaling_laws import Law
from spectra_jax.errors import UserError
from spectra_jax.train.workdir import write_run

COLUMNS = {"family": "FloatLM", "weight": "float", "bits": np.nan, "arm": "neither", "D": 32, "F": 64, "L": 2, "V": 304,
           "tokens": 1000, "seed": 0, "parameters": 1000}


def make(folder, losses, **about) -> dict:
    """A row of the table, with the files that say what it was measured on."""
    path = folder / str(len(list(folder.iterdir())))
    write_run(path, replace(tiny(), seed=about.get("seed", 0)), fingerprint="f", tokenizer="{}")
    np.savez(path / runs.HELD_OUT, **{data().name: np.asarray(losses, float)})
    return COLUMNS | {"folder": str(path), "run": path.name} | about


@pytest.fixture
def pairs(tmp_path):
    """TriLM and FloatLM at three sizes, the smallest with three seeds, and their losses."""
    rng, rows, losses = np.random.default_rng(0), [], {}
    for size in (16, 32, 64):
        for seed in (0, 1, 2) if size == 16 else (0,):
            text = rng.normal(5, 1, 40)  # what is hard is hard for both
            for family, weight, arm in (("FloatLM", "float", "neither"), ("TriLM", "ternary", "both")):
                losses[size, seed, family] = text + rng.normal(0.2 if family == "TriLM" else 0, 0.1, 40)
                rows.append(make(tmp_path, losses[size, seed, family], family=family, weight=weight, arm=arm, D=size,
                                 seed=seed, parameters=size * 1000))
    return pd.DataFrame(rows), losses


def test_gaps_by_hand(pairs):
    table, losses = pairs
    found = comparison.gaps(table).set_index("D")
    assert list(found["seeds"]) == [3, 1, 1] and set(found["pair"]) == {"TriLM - FloatLM"}
    each = [losses[16, seed, "TriLM"] - losses[16, seed, "FloatLM"] for seed in (0, 1, 2)]
    assert found.loc[16, "gap"] == pytest.approx(np.mean(each))
    text = np.mean([stats.sem(d) for d in each])
    spread = np.std([d.mean() for d in each], ddof=1)
    assert found.loc[16, "text"] == pytest.approx(text)
    assert found.loc[16, "seed"] == pytest.approx(spread / np.sqrt(3))
    assert found.loc[16, "error"] == pytest.approx(np.hypot(text, spread / np.sqrt(3)))
    assert found.loc[32, "seed"] == pytest.approx(spread), "trained once: the spread that is known of another size"
    one = losses[64, 0, "TriLM"] - losses[64, 0, "FloatLM"]
    assert found.loc[64, "gap"] == pytest.approx(one.mean()) and found.loc[64, "text"] == pytest.approx(stats.sem(one))


def test_without_any_second_seed(pairs):
    table, _ = pairs
    found = comparison.gaps(table[table["seed"] == 0])
    assert found["seed"].isna().all() and list(found["error"]) == list(found["text"])


def test_a_trend_against_scipy():
    """Equal errors: the ordinary regression of the gap on the number of doublings."""
    sizes, gap = np.array([1e5, 2e5, 4e5, 16e5]), np.array([0.20, 0.17, 0.15, 0.11])
    found = comparison.trend(pd.DataFrame({
        "pair": "a - b", "parameters": sizes, "tokens": 1, "gap": gap, "error": 0.01,
    })).iloc[0]
    line = stats.linregress(np.log2(sizes), gap)
    assert found["for_each_doubling"] == pytest.approx(line.slope)
    assert found["high"] - found["for_each_doubling"] == pytest.approx(stats.t.ppf(0.975, 2) * line.stderr)
    assert comparison.trend(pd.DataFrame({
        "pair": "a - b", "parameters": [1e5, 2e5], "tokens": 1, "gap": [1.0, 2.0], "error": 0.1,
    })).empty, "two sizes make any line"


def test_labels():
    rows = pd.DataFrame([
        COLUMNS, COLUMNS | {"family": "QuantLM", "bits": 3.0}, COLUMNS | {"family": "TriLM", "weight": "ternary"},
        COLUMNS | {"family": "TriLM", "weight": "ternary", "arm": "both"},
        COLUMNS | {"family": "QuantLM awq", "bits": 4.0},
    ])
    assert list(comparison.label(rows)) == ["FloatLM", "QuantLM 3-bit", "TriLM neither", "TriLM", "QuantLM awq 4-bit"]
    assert list(comparison.main_rows(rows)["label"]) == ["FloatLM", "QuantLM 3-bit", "TriLM", "QuantLM awq 4-bit"]
    shorter = comparison.main_rows(rows.assign(tokens=[1000, 1000, 1000, 500, 1000]))
    assert "TriLM" not in set(shorter["label"])


def test_nothing_to_compare(pairs):
    table, _ = pairs
    with pytest.raises(UserError, match="no two runs of BiLM and FloatLM have shape, tokens and seed in common"):
        comparison.gaps(table, [("BiLM", "FloatLM")])


def test_runs_on_different_text(tmp_path):
    rows = [make(tmp_path, np.ones(n), family=family, weight=w, arm=arm) for n, family, w, arm in (
        (10, "FloatLM", "float", "neither"), (11, "TriLM", "ternary", "both"))]
    with pytest.raises(UserError, match="were measured on different text; make both rows by one sweep"):
        comparison.gaps(pd.DataFrame(rows))


def test_a_row_that_was_not_measured(tmp_path):
    with pytest.raises(UserError, match="held_out.npz is missing: rows of `spectra sweep` have it"):
        runs.losses(tmp_path)


# Laws of a whole suite, made from known ones


@pytest.fixture(scope="module")
def known() -> pd.DataFrame:
    """Five sizes at three budgets; bits as of FloatLM, two widths and TriLM."""
    law = Law("joint", {"x": {"A": 20.0, "alpha": 0.4, "B": 400.0, "beta": 0.5, "E": 2.0}})
    rows = []
    for D in (32, 64, 96, 128, 192):
        n = D * D * 40.0
        for tokens in (2.5e5, 5e5, 1e6):
            for family, weight, arm, bits, width, worse in (
                ("FloatLM", "float", "neither", np.nan, 16, 0.0), ("TriLM", "ternary", "both", np.nan, 2, 0.10),
                ("QuantLM", "float", "neither", 4.0, 4.25, 0.01), ("QuantLM", "float", "neither", 3.0, 3.25, 0.30),
            ):
                if tokens == 1e6 or bits != bits:
                    rows.append(COLUMNS | {
                        "family": family, "weight": weight, "arm": arm, "bits": bits, "D": D, "tokens": tokens,
                        "parameters": n, "stored_bits": width * n, "block_bits": width * n,
                        "loss": float(law("x", n, tokens)) + worse,
                    })
    return pd.DataFrame(rows)


def test_laws_of_a_suite(known):
    found = comparison.laws(known, resamples=0)
    assert set(found) == {"size", "power", "bits", "block_bits", "tokens"}
    for family in ("FloatLM", "TriLM"):
        joint = found["tokens"].law.constants[family]
        assert joint["alpha"] == pytest.approx(0.4, rel=1e-3) and joint["beta"] == pytest.approx(0.5, rel=1e-3)
        assert joint["E"] == pytest.approx(2.0 if family == "FloatLM" else 2.1, rel=1e-3)
        assert found["size"].law.constants[family]["alpha"] == pytest.approx(0.4, rel=1e-3)
    assert set(found["bits"].law.constants) == {"FloatLM", "TriLM", "QuantLM 4-bit", "QuantLM 3-bit"}
    no_budgets = comparison.laws(known[known["tokens"] == 1e6], resamples=0)
    assert set(no_budgets) == {"size", "power", "bits", "block_bits"}


def test_the_best_width(known):
    """At equal bits 4-bit models beat 3-bit ones, which lose more than the smaller size gains."""
    law = comparison.laws(known, resamples=0)["bits"]
    table = comparison.best_at(law)
    inside = known[(known["tokens"] == 1e6)].assign(label=lambda t: comparison.label(t))
    for row in table.itertuples():
        reach = inside.groupby("label")["stored_bits"].agg(["min", "max"])
        there = reach[(reach["min"] <= row.stored_bits) & (row.stored_bits <= reach["max"])].index
        losses = {name: float(law.law(name, row.stored_bits)) for name in there}
        assert row.best == min(losses, key=losses.get) and row.ahead_by >= 0 and len(losses) > 1
    assert "QuantLM 3-bit" not in set(table["best"])
    assert list(comparison.best_at(law, [1e3])["best"]) == [], "no model is so small"


def test_figures(known, pairs, tmp_path):
    found = comparison.laws(known, resamples=20)
    figure = plots.scaling(found["size"], tmp_path / "law.png")
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert {plots.FAMILIES["TriLM"][0], plots.FAMILIES["FloatLM"][0]} == colors
    assert any("x^-0.4" in text.get_text() for text in figure.axes[0].get_legend().get_texts())
    with pytest.raises(UserError, match="a joint law of size and tokens is no curve"):
        plots.scaling(found["tokens"])
    gaps = plots.gaps(comparison.gaps(pairs[0]), tmp_path / "gaps.svg")
    assert [text.get_text() for text in gaps.axes[0].get_legend().get_texts()] == ["TriLM - FloatLM"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("law.png", "gaps.svg"))
