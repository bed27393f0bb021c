"""local.sh really trains: two processes of two devices, stopped and continued, have the losses of one with four."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, arguments, data, environment
from trainer import OVERRIDES, Trainer, last_step, losses, start

from spectra_jax.cli import STOPPED

SOME = ("train.steps=70", "checkpoint.every_steps=50", "evaluate.every_steps=0")


def launch(workdir: Path) -> Trainer:
    """The script as a user types it, from the root of the project, with the spectra of this environment."""
    env = environment()
    env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), env["PATH"]))
    command = [
        shutil.which("bash"), "launch/local.sh", "--processes=2", "--devices-per-process=2", f"--workdir={workdir}",
        "--", "--config=configs/quickstart.py:TriLM", f"--config.data.sets={data()}", *arguments((*OVERRIDES, *SOME)),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    return Trainer(workdir, [process])


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    ((status, said),) = launch(tmp_path / "two").beyond(10).send(signal.SIGTERM).end()
    left = last_step(tmp_path / "two")
    assert status == STOPPED and 10 < left < 70, said
    assert said.count(f"saved after step {left}; the same command continues") == 2, said
    ((status, said),) = launch(tmp_path / "two").end()
    assert status == 0 and f"resuming after step {left}," in said, said
    assert "4 device(s) (1 slice x 4 data x 1 model)" in said
    ((status, said),) = start(tmp_path / "one", *SOME, devices=4).end()
    assert status == 0, said
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == 70 and found == pytest.approx(expected, rel=1e-5)
