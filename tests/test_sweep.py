"""The schedule ablation at its tiny size, shrunk further: four rows, trained once, drawn in one figure."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ROOT, STEPS, TINY, TOKENS_PER_STEP, arguments, data, spectra

from spectra_jax import metrics
from spectra_jax.analysis import runs
from spectra_jax.errors import UserError
from spectra_jax.evaluate.report import evaluate_sets
from spectra_jax.serve.load import load
from spectra_jax.sweep import Row, run_sweep, shares, table

ARMS = ["both", "only-decay-removed", "only-peak-lowered", "neither"]
SPEC = f"{ROOT}/configs/sweeps/schedule.py:tiny"


def sweep(workdir: Path, *overrides: str):
    """`spectra sweep` on the tiny data, in a process with one device."""
    return spectra(
        f"--sweep={SPEC}", f"--workdir={workdir}", f"--config.data.sets={data()}",
        *arguments([*TINY, "checkpoint.permanent_tokens=0", "metrics.weights_every_steps=0", *overrides]),
        module="spectra_jax.sweep",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The workdir of the finished ablation, and what it printed."""
    workdir = tmp_path_factory.mktemp("sweep") / "schedule"
    done = sweep(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_four_arms(finished):
    workdir, printed = finished
    results = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in results] == ARMS
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in workdir.iterdir()) == sorted([*ARMS, "loss.png", "results.jsonl"])
    lines = printed.splitlines()
    assert lines[:4] == [f"row {k} of 4: {name}" for k, name in enumerate(ARMS, 1)]
    assert lines[4].split() == ["row", "parameters", "per", "weight", "train", "loss", "validation"]
    for row, line in zip(results, lines[5:], strict=True):
        name, parameters, bits, train, held_out, sign, error = line.split()
        assert (name, parameters, train) == (row["name"], "38,048", f"{row['train']['loss']:.4f}")
        assert (held_out, sign, error) == (f"{row['loss']:.4f}", "+-", f"{row['loss_se']:.4f}")
        # By hand: 2 bits a code and a float32 scale for each of 7 matrices of 2 layers.
        linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
        assert row["linear"] == linear and row["bits_per_weight"] == pytest.approx(2 + 14 * 32 / linear)


def test_the_held_out_losses_are_of_the_whole_split(finished):
    """Beside the loss that the run itself saw last, which is of one batch."""
    workdir, _ = finished
    results = {row["name"]: row for row in map(json.loads, (workdir / "results.jsonl").read_text().splitlines())}
    expected = evaluate_sets(load(str(workdir / "both"), devices=jax.devices()[:1]), [str(data())])[str(data())]
    assert results["both"]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    kept = runs.losses(workdir / "both")["data"]
    assert kept.mean() == pytest.approx(expected.loss, rel=1e-6) and kept.size == expected.sequences > 8
    difference, error = runs.above(workdir / "neither", workdir / "both")
    other = runs.losses(workdir / "neither")["data"]
    assert difference == pytest.approx(results["neither"]["loss"] - results["both"]["loss"], rel=1e-6)
    assert error == pytest.approx(np.std(other - kept, ddof=1) / np.sqrt(kept.size), rel=1e-9)
    assert error < results["both"]["loss_se"] / 2, "the same sequences are hard for both"


def test_the_arms_differ_by_their_interventions_alone(finished):
    workdir, _ = finished
    events = {name: [r["name"] for r in metrics.read(workdir / name) if r["kind"] == "event"] for name in ARMS}
    assert events == {
        "both": ["peak lowered", "decay removed"], "only-decay-removed": ["decay removed"],
        "only-peak-lowered": ["peak lowered"], "neither": [],
    }
    losses = {
        name: [r["loss"] for r in metrics.read(workdir / name) if r["kind"] == "train"] for name in ARMS
    }
    # The same weights and batches: equal until the interventions, which are felt from the next step on.
    both, decay, peak, neither = losses.values()
    assert both[:7] == pytest.approx(neither[:7], rel=1e-6) and both[7] != pytest.approx(neither[7], rel=1e-5)
    assert both[:9] == pytest.approx(peak[:9], rel=1e-6) and both[9] != pytest.approx(peak[9], rel=1e-6)
    assert decay[:9] == pytest.approx(neither[:9], rel=1e-6) and decay[9] != pytest.approx(neither[9], rel=1e-6)


def test_finished_rows_are_skipped_and_stopped_ones_resumed(finished, tmp_path):
    workdir = Path(shutil.copytree(finished[0], tmp_path / "sweep"))
    before = (workdir / "results.jsonl").read_text()
    (workdir / "results.jsonl").unlink()
    (workdir / "loss.png").unlink()
    (workdir / "neither" / "finished.json").unlink()  # stopped between the last checkpoint and this file
    untouched = {p: p.stat().st_mtime_ns for name in ARMS[:3] for p in (workdir / name).rglob("*")}
    done = sweep(workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == [f"row {k} of 4: {n} (finished)" for k, n in enumerate(ARMS[:3], 1)] + [
        "row 4 of 4: neither"
    ]
    assert (workdir / "results.jsonl").read_text() == before and (workdir / "loss.png").is_file()
    assert {p: p.stat().st_mtime_ns for name in ARMS[:3] for p in (workdir / name).rglob("*")} == untouched


def test_finished_rows_of_another_config_are_not_passed_off(finished):
    done = sweep(finished[0], "schedule.peak=0.5")
    assert done.returncode == 2
    assert "both is finished with another config:\n  schedule.peak: 0.01 -> 0.5\nuse a new --workdir" in done.stderr


def write(path: Path, body: str) -> str:
    """A sweep file."""
    path.write_text(f"from spectra_jax import config\n\n\ndef get_sweep():\n    c = config.default()\n    {body}\n")
    return str(path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [('a', c), ('b', c), ('a', c)]", r"sweep.py: row names repeat: \['a', 'b', 'a'\]"),
        ("c.model.layers = 3; return [('a', c)]", "unknown key config.model.layers"),
        ("c.model.N = 7; return [('a', c)]", "config.model.N=7 is not divisible by config.model.K=8"),
        ("return []", "sweep.py: get_sweep must return a list of .row name, ConfigDict., or .* at least one"),
        ("return [c]", "sweep.py: get_sweep must return a list of .row name, ConfigDict., or of three"),
        ("return [('../a', c)]", "sweep.py: the row name '../a' is no name of a folder"),
        ("return [('a', c, 1)]", "sweep.py: get_sweep must return a list of .row name, ConfigDict., or of three"),
        ("c.quantize.method = 'rtn'; return [('q', c, 'a'), ('a', c)]",
         "the row 'q' is to be quantized from 'a', which is no float row before it; the rows before it are none"),
        ("c.model.weight = 'ternary'; return [('a', c), ('q', c, 'a')]", "quantized from 'a', which is no float row"),
        ("return [('a', c), ('q', c, 'a')]", "the row 'q' names no config.quantize.method"),
    ],
)
def test_a_sweep_file_that_cannot_work(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        run_sweep(write(tmp_path / "sweep.py", body), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        ("configs/sweeps/shedule.py", [], "no config file 'configs/sweeps/shedule.py'"),
        (f"{ROOT}/configs/trilm.py", [], r"trilm.py has no function get_sweep\(arg\)"),
        (f"{ROOT}/configs/sweeps/schedule.py:7z", [], "no size '7z' in the suite"),
        (SPEC, ["train.stepz=3"], "unknown key config.train.stepz; did you mean config.train.steps?"),
        (SPEC, ["data.batch=12"], "config.data.batch=12 .* is not divisible by the data axes"),
    ],
)
def test_a_sweep_that_cannot_start(tmp_path, monkeypatch, spec, overrides, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        run_sweep(spec, tmp_path / "out", [f"data.sets={data()}", "data.T=16", *overrides])
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UserError, match="cannot write to .*out/both: .*; use another --workdir"):
        run_sweep(SPEC, tmp_path / "out", [*TINY, f"data.sets={data()}"])
    assert (tmp_path / "out").read_text() == "precious"


QUANTIZED = """
    q = config.default()
    q.family = 'QuantLM'
    q.quantize.method, q.quantize.bits, q.quantize.group = 'rtn', 4, 16
    return [('flt', c), ('flt-4bit', q, 'flt')]"""


def test_a_row_that_is_quantized(tmp_path):
    """It is made of the row it names, measured on the same text, and not made again."""
    file, overrides = write(tmp_path / "sweep.py", QUANTIZED), [*TINY, f"data.sets={data()}"]
    first = run_sweep(file, tmp_path / "out", overrides)
    assert [row["name"] for row in first] == ["flt", "flt-4bit"] and "train" not in first[1]
    assert [round(row["bits_per_weight"], 2) for row in first] == [16, 5]  # 4 and a 16-bit scale for 16 inputs
    assert first[0]["loss"] != first[1]["loss"] == pytest.approx(first[0]["loss"], rel=0.1)
    made = tmp_path / "out" / "flt-4bit"
    frame = runs.table([tmp_path / "out"])
    assert list(frame["run"]) == ["flt", "flt-4bit"] and frame["data"].nunique() == frame["tokenizer"].nunique() == 1
    assert list(frame["loss"]) == [row["loss"] for row in first]
    assert list(frame["stored_bits"]) == [row["stored_bits"] for row in first]
    assert list(frame["bits"].fillna(0)) == [0, 4] and set(frame["tokens"]) == {STEPS * TOKENS_PER_STEP}
    # Stopped after it was made and before it was measured.
    (made / "finished.json").unlink()
    (made / "held_out.npz").unlink()
    stamp = (made / "config.json").stat().st_mtime_ns
    assert run_sweep(file, tmp_path / "out", overrides) == first and (made / "held_out.npz").is_file()
    assert (made / "config.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="flt is finished with another config:\n  optimizer.eps: .* -> 0.1"):
        run_sweep(file, tmp_path / "out", [*overrides, "optimizer.eps=0.1"])


def test_workers_take_quantized_rows_with_their_source():
    sources = {"a": "", "a4": "a", "b": "", "b4": "b", "c": "", "a3": "a"}
    rows = [Row(name, None, of) for name, of in sources.items()]
    assert [shares(rows, n) for n in (1, 2, 3)] == [[0] * 6, [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 0]]


def test_the_table_of_rows_without_a_number():
    rows = [
        {"name": name, "parameters": 1000, "bits_per_weight": 2.5, "loss": 3.0, "loss_se": 0.5, **train}
        for name, train in (("a", {"train": {"loss": None}}), ("b", {"train": {"loss": 1.0}}), ("c", {}))
    ]
    assert [line.split()[3] for line in table(rows).splitlines()[1:]] == ["-", "1.0000", "-"]
