"""What goes wrong with disks, files and readers while the real trainer runs, and what it does about it."""

import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import ROOT, data
from trainer import EVERY, last_step, losses, start

FOLDER = "checkpoints"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """The losses of the run that nothing happens to."""
    workdir = tmp_path_factory.mktemp("faults") / "alone"
    assert start(workdir).end()[0][0] == 0
    return losses(workdir)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run that was killed with the checkpoints of two steps."""
    workdir = tmp_path_factory.mktemp("faults") / "killed"
    run = start(workdir, "checkpoint.keep=2")
    run.until((workdir / FOLDER / str(2 * EVERY)).is_dir)
    run.send(signal.SIGKILL).end()
    assert steps(workdir) == [EVERY, 2 * EVERY]
    return workdir


def steps(workdir: Path) -> list[int]:
    """The finished checkpoints, as their folders are named."""
    return sorted(int(path.name) for path in (workdir / FOLDER).iterdir() if path.name.isdigit())


DAMAGES = {
    "a bit": lambda step: flip(max(step.glob("parameters/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)),
    "cut short": lambda step: [p.write_bytes(p.read_bytes()[:99]) for p in step.glob("training/ocdbt.process_0/d/*")],
    "an item missing": lambda step: shutil.rmtree(step / "training"),
    "an empty folder": lambda step: [shutil.rmtree(step), step.mkdir()],
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_checkpoint_is_spoilt(tmp_path, alone, killed, damage):
    """The run goes on from the one before, says so, and ends with the same numbers; leftovers are cleaned away."""
    workdir = Path(shutil.copytree(killed, tmp_path / "run"))
    DAMAGES[damage](workdir / FOLDER / str(2 * EVERY))
    stale = workdir / FOLDER / "120.orbax-checkpoint-tmp"
    stale.mkdir()
    (stale / "half").write_text("written")
    ((status, said),) = start(workdir).end()
    assert status == 0, said
    assert f"{2 * EVERY} is damaged: " in said and f"set aside as {workdir / FOLDER / str(2 * EVERY)}.damaged" in said
    assert f"resuming after step {EVERY}, " in said
    assert losses(workdir) == alone
    assert not stale.exists() and (workdir / FOLDER / f"{2 * EVERY}.damaged").is_dir()


def test_a_save_that_fails_ends_the_run_at_once(tmp_path, alone):
    """No file may grow any more, as on a full disk: what failed in the background is not found out a save later."""
    workdir = tmp_path / "run"
    run = start(workdir, "checkpoint.every_steps=60").beyond(5)
    resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    ((status, said),) = run.end()
    assert status == 2 and "Traceback" not in said, said
    assert f"error: could not save a checkpoint in {workdir / FOLDER}: " in said and "B are free. Earlier" in said
    assert 60 <= last_step(workdir) < 120
    assert start(workdir, "checkpoint.every_steps=60").end()[0][0] == 0
    assert losses(workdir) == alone


def test_the_checkpoints_are_deleted_under_a_run(tmp_path, alone):
    """They come back with the next save."""
    workdir = tmp_path / "run"
    run = start(workdir)
    run.until((workdir / FOLDER / str(EVERY)).is_dir)
    run.send(signal.SIGSTOP)
    shutil.rmtree(workdir / FOLDER)
    ((status, said),) = run.send(signal.SIGCONT).end()
    assert status == 0, said
    assert losses(workdir) == alone and steps(workdir)[-1] == 300


STALLING = f"""
import sys, time
from spectra_jax.data.loader import RecordReader

read, calls = RecordReader.__getitem__, []
def stall(self, index):
    calls.append(index)
    if len(calls) > 600:
        time.sleep(600)  # as a disk or a network that does not answer
    return read(self, index)
RecordReader.__getitem__ = stall
sys.path.insert(0, "{ROOT}")
from spectra_jax.cli import main
main("train")
"""


def test_a_reader_that_stalls_is_an_error_and_no_hang(tmp_path):
    run = start(tmp_path / "run", "train.stuck_seconds=8", wrap=("-c", STALLING))
    began = time.monotonic()
    ((status, said),) = run.end()
    assert status == 1 and time.monotonic() - began < 100
    assert "Timeout (0:00:08)" in said and "in stall" in said and "in batch_at" in said, said[-3000:]
    assert last_step(tmp_path / "run") > 20


@pytest.mark.slow
def test_data_that_one_of_two_processes_cannot_read_end_both(tmp_path):
    """The record is damaged after the start, where it is not looked at before it is needed."""
    copy = Path(shutil.copytree(data(), tmp_path / "data"))
    run = start(tmp_path / "run", f"data.sets={copy}", processes=2, devices=2).beyond(0)
    for path in copy.glob("train*"):
        path.write_bytes(bytes(path.stat().st_size))
    ended = run.end()
    assert all(status not in (0, None) for status, _ in ended)
    assert any("is corrupt" in said for _, said in ended), [said[-500:] for _, said in ended]
