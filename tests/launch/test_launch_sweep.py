"""launch/sweep.py: every row has one worker, finished rows are skipped, and `spectra sweep` takes the result."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, arguments, data, environment, spectra

from spectra_jax import config as configs
from spectra_jax.errors import UserError

SCRIPT = ROOT / "launch" / "sweep.py"
SPEC = f"{ROOT}/configs/sweeps/schedule.py:tiny"
ROWS = ["both", "only-decay-removed", "only-peak-lowered", "neither"]
# Of one row a run is made: these are enough to train the others as well.
OVERRIDES = (
    *TINY, "train.steps=4", "checkpoint.permanent_tokens=0", "checkpoint.every_steps=4", "evaluate.every_steps=4",
    "metrics.weights_every_steps=0",
)


@pytest.fixture(scope="module")
def run():
    """The function of the script."""
    spec = importlib.util.spec_from_file_location("launch_sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


def worker(sweep: str, workdir: Path, number: int, workers: int, *extra: str) -> subprocess.CompletedProcess:
    """One worker, in a process with one device."""
    return subprocess.run(
        [sys.executable, SCRIPT, f"--sweep={sweep}", f"--workdir={workdir}", f"--worker={number}",
         f"--workers={workers}", f"--config.data.sets={data()}", *arguments(OVERRIDES), *extra],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_every_row_has_one_worker(workers, run, tmp_path, capsys):
    taken = []
    for number in range(workers):
        run(SPEC, tmp_path / "out", number, workers, [f"data.sets={data()}"], True)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[1] for line in lines] == ROWS
        mine = [line.split(": ")[1] for line in lines if line.endswith(": taken")]
        assert mine == ROWS[number::workers]
        assert all(line.endswith("'s") for line in lines if not line.endswith(": taken"))
        taken += mine
    assert sorted(taken) == sorted(ROWS)
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"


def test_a_finished_row_is_skipped_and_of_another_config_refused(run, tmp_path, capsys):
    folder, row = tmp_path / "both", configs.override(dict_rows()["both"], ["name=both"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": configs.to_dict(row), "data_fingerprint": ""}))
    (folder / "finished.json").write_text("{}")
    run(SPEC, tmp_path, 0, 2, [], True)
    assert capsys.readouterr().out.splitlines() == [
        "row 1 of 4: both: skipped, finished", "row 2 of 4: only-decay-removed: skipped, worker 1's",
        "row 3 of 4: only-peak-lowered: taken", "row 4 of 4: neither: skipped, worker 1's",
    ]
    with pytest.raises(UserError, match=r"both is finished with another config:\n  schedule.peak: .* -> 0.5"):
        run(SPEC, tmp_path, 0, 2, ["schedule.peak=0.5"], True)
    run(SPEC, tmp_path, 1, 2, ["schedule.peak=0.5"], True)  # another worker's row


def dict_rows() -> dict:
    """The configs of the sweep, by row."""
    return {name: configs.from_config_dict(c) for name, c in configs.run_config_file(SPEC, "get_sweep")}


@pytest.mark.parametrize(("number", "workers"), [(2, 2), (-1, 2), (0, 0)])
def test_a_worker_that_there_is_not(number, workers, run, tmp_path):
    with pytest.raises(UserError, match=f"--worker={number} of --workers={workers}: it must be from 0 to one less"):
        run(SPEC, tmp_path, number, workers, [], True)


@pytest.mark.slow
def test_two_workers_train_what_one_sweep_takes(tmp_path):
    file, workdir = tmp_path / "two.py", tmp_path / "out"
    file.write_text(
        "from spectra_jax import config\n\n\ndef get_sweep():\n"
        "    rows = [('cosine', config.default()), ('linear', config.default())]\n"
        "    rows[1][1].schedule.shape = 'linear'\n    return rows\n"
    )
    for number, name in ((1, "linear"), (0, "cosine")):
        done = worker(str(file), workdir, number, 2)
        assert done.returncode == 0 and f"{name}: taken" in done.stdout, done.stderr
        assert (workdir / name / "finished.json").is_file()
    assert not (workdir / "results.jsonl").exists()
    again = worker(str(file), workdir, 0, 2)
    assert again.returncode == 0 and "cosine: skipped, finished" in again.stdout
    other = worker(str(file), workdir, 0, 2, "--config.schedule.peak=0.5")
    assert other.returncode == 2 and "finished with another config" in other.stderr
    wrong = worker(str(file), workdir, 0, 2, "--config.train.stepz=3")
    assert wrong.returncode == 2 and "did you mean config.train.steps?" in wrong.stderr
    all_of_it = spectra(
        f"--sweep={file}", f"--workdir={workdir}", f"--config.data.sets={data()}", *arguments(OVERRIDES),
        module="spectra_jax.sweep",
    )
    assert all_of_it.returncode == 0, all_of_it.stderr
    lines = all_of_it.stdout.splitlines()
    assert lines[:2] == ["row 1 of 2: cosine (finished)", "row 2 of 2: linear (finished)"]
    results = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in results] == ["cosine", "linear"]
    assert results[0]["train"]["loss"] != results[1]["train"]["loss"] and results[0]["train"]["step"] == 4
