"""The suite's 99M models, as their config files give them, take real steps; only the batch is smaller."""

import math
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, environment, prepare_set

from spectra_jax import metrics
from spectra_jax.checkpoint import Checkpoints

SHRUNK = ("data.T=64", "data.batch=2", "train.steps=2", "evaluate.batches=1", "metrics.every_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["floatlm", "trilm", "bilm", "bitnet"])
def test_two_steps_of_99m(tmp_path, stem):
    folder, workdir = prepare_set(tmp_path / "set", context=64), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "spectra_jax.train", f"--config=configs/{stem}.py:99m", f"--workdir={workdir}",
         f"--config.data.sets={folder}", *(f"--config.{text}" for text in SHRUNK)],
        env=environment(quick=False), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    stderr = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.stderr.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, stderr
    # Two copies of parameters, two moments and a gradient in float32 are 2 GB; Linux counts kilobytes.
    assert usage.ru_maxrss < 6 << 20, f"{usage.ru_maxrss / 2**20:.1f} GiB resident"
    records = {(r["kind"], r["step"]): r for r in metrics.read(workdir)}
    first, second = records["train", 1], records["train", 2]
    assert first["loss"] == pytest.approx(math.log(50304), abs=0.3)  # nothing is known yet of 50304 tokens
    assert second["loss"] < first["loss"] and second["skipped"] == 0
    assert math.isfinite(records["eval", 2]["loss"]) and first["grad_norm"] > 0
    assert ("weights", 1) in records or stem == "floatlm"
    assert Checkpoints(workdir).steps() == [2]
    shutil.rmtree(workdir)  # close to 1 GB
