"""The suite's 99M models, as their config files give them, take real steps; only the batch is smaller."""

import math
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, environment, prepare_set

from spectra_jax import metrics
from spectra_jax.checkpoint import Checkpoints

# The highest resident size from the process's own view: what wait4 says starts at the size of the test's process.
CODE = """
import atexit, pathlib, runpy
atexit.register(lambda: print(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
runpy.run_module("spectra_jax.train", run_name="__main__")
"""
SHRUNK = ("data.T=64", "data.batch=2", "train.steps=2", "evaluate.batches=1", "metrics.every_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["floatlm", "trilm", "bilm", "bitnet"])
def test_two_steps_of_99m(tmp_path, stem):
    folder, workdir = prepare_set(tmp_path / "set", context=64), tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", CODE, f"--config=configs/{stem}.py:99m", f"--workdir={workdir}",
         f"--config.data.sets={folder}", *(f"--config.{text}" for text in SHRUNK)],
        env=environment(quick=False), cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    # Two copies of parameters, two moments and a gradient in float32 are 2 GB; Linux counts kilobytes.
    resident = int(done.stdout.split()[-1])
    assert resident < 6 << 20, f"{resident / 2**20:.1f} GiB resident"
    records = {(r["kind"], r["step"]): r for r in metrics.read(workdir)}
    first, second = records["train", 1], records["train", 2]
    assert first["loss"] == pytest.approx(math.log(50304), abs=0.3)  # nothing is known yet of 50304 tokens
    assert second["loss"] < first["loss"] and second["skipped"] == 0
    assert math.isfinite(records["eval", 2]["loss"]) and first["grad_norm"] > 0
    assert ("weights", 1) in records or stem == "floatlm"
    assert Checkpoints(workdir).steps() == [2]
    shutil.rmtree(workdir)  # close to 1 GB
