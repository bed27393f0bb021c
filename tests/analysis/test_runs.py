"""The table of runs against configs, records and files."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from helpers import TERNARY, data, trained

from spectra_jax.analysis import runs
from spectra_jax.errors import UserError
from spectra_jax.serve.load import load
from spectra_jax.serve.pack import pack
from spectra_jax.weights.form import size_in_bits


def test_a_suite(suite):
    table = runs.table([suite]).set_index("run")
    assert len(table) == 13 and list(table.index) == sorted(table.index)
    assert table["data"].nunique() == table["tokenizer"].nunique() == table["commit"].nunique() == 1
    assert (table["tokens"] == 6 * 8 * 16).all() and (table["step"] == 6).all() and table["loss"].between(3, 6).all()
    assert list(table.loc[["floatlm-16", "trilm-16", "quantlm-16"], "family"]) == ["FloatLM", "TriLM", "QuantLM rtn"]
    assert list(table.loc[["trilm-32", "trilm-32-neither"], "arm"]) == ["both", "neither"]
    assert table.loc["quantlm-16", "bits"] == 4 and table.loc["quantlm-16", "bits_per_weight"] == 5
    assert table.loc["floatlm-16", "block_bits"] == 16 * table.loc["floatlm-16", "linear"]
    tokenizer = (suite / "floatlm-16" / "tokenizer.json").read_bytes()
    assert table.loc["floatlm-16", "tokenizer"] == hashlib.sha256(tokenizer).hexdigest()
    for name in ("trilm-48", "quantlm-48"):
        stored, paper = size_in_bits(load(str(suite / name)).parameters)
        assert (table.loc[name, "stored_bits"], table.loc[name, "paper_bits"]) == (stored, paper)
        finished = json.loads((suite / name / "finished.json").read_text())
        assert table.loc[name, "loss"] == finished["loss"] == pytest.approx(runs.losses(suite / name)["data"].mean())


@pytest.mark.parametrize("trits", [False, True])
def test_a_packed_run_is_as_large_as_its_forms(trits, tmp_path):
    folder = trained(*TERNARY)
    pack(str(folder), tmp_path / "packed", trits=trits)
    table = runs.table([folder, tmp_path / "packed"]).set_index("run")
    assert table.loc["packed", "stored_bits"] == size_in_bits(load(str(tmp_path / "packed")).parameters)[0]
    assert table.loc["packed", "bits_per_weight"] == table.loc[folder.name, "bits_per_weight"] < 3


def test_runs_that_no_sweep_made():
    """The last evaluation of training at that step, without its error; NaN where there was none."""
    folder = trained(*TERNARY)
    table = runs.table([folder, f"{folder}@4", f"{folder}/@8"])
    evaluated = [r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
                 if r["kind"] == "eval" and r["step"] == 12]
    assert table["loss"][0] == evaluated[-1] and table["loss"][1:].isna().all() and table["loss_se"].isna().all()
    assert list(table["tokens"]) == [12 * 128, 4 * 128, 8 * 128] and list(table["step"]) == [12, 4, 8]


def test_where_the_time_went(suite):
    table = runs.times([suite / "trilm-16", suite / "floatlm-16"])
    assert list(table["run"]) == ["trilm-16", "floatlm-16"] and (table["restarts"] == 0).all()
    parts = table[["start", "compile", "stall", "eval", "checkpoint", "train", "lost"]].sum(axis=1)
    assert np.allclose(parts, table["seconds"])
    assert np.allclose(table["goodput"], table["train"] / table["seconds"], atol=1e-3)
    assert runs.is_trained(suite / "trilm-16") and not runs.is_trained(suite / "quantlm-16")


def test_the_difference_of_two_rows(suite):
    difference, error = runs.above(suite / "trilm-64", suite / "floatlm-64")
    a, b = (runs.losses(suite / name)[data().name] for name in ("trilm-64", "floatlm-64"))
    assert difference == pytest.approx(np.mean(a - b)) and error == pytest.approx(pd.Series(a - b).sem())
    with pytest.raises(UserError, match="held_out.npz is missing"):
        runs.losses(trained(*TERNARY))


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match="holds no run and no rows of a sweep: there is no config.json in it or below"):
        runs.table([tmp_path])
    with pytest.raises(UserError, match="has no checkpoint of step 5"):
        runs.table([f"{trained(*TERNARY)}@5"])
