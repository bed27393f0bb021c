"""`python -m spectra_jax.train`, killed and started again: the same bits as a run that was left alone."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, TINY, arguments, data, environment, same_bits, state_on_disk

from spectra_jax import metrics
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.cli import STOPPED

STEPS, EVERY = 300, 40
OVERRIDES = (
    *TINY, "train.accumulate=2", "train.loss_chunks=1", "model.attention_blocks=1", f"train.steps={STEPS}",
    f"checkpoint.every_steps={EVERY}", "checkpoint.permanent_tokens=0", "evaluate.every_steps=60",
    "metrics.weights_every_steps=0",
)


def command(workdir: Path) -> list[str]:
    """TriLM's schedule with both interventions, as a user types it."""
    return [
        sys.executable, "-m", "spectra_jax.train", "--config=configs/quickstart.py:TriLM", f"--workdir={workdir}",
        f"--config.data.sets={data()}", *arguments(OVERRIDES),
    ]


def start(workdir: Path, quick: bool = False) -> subprocess.Popen:
    """A training process that compiles as users' do: a resumed run compiles again, and must get the same programs."""
    return subprocess.Popen(
        command(workdir), env=environment(quick=quick), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )


def last_step(workdir: Path) -> int:
    """The newest training step on record."""
    if not (workdir / metrics.FILE).exists():
        return 0
    return max((r["step"] for r in metrics.read(workdir) if r["kind"] == "train"), default=0)


def stop(process: subprocess.Popen, workdir: Path, beyond: int, by: signal.Signals) -> str:
    """Waits until the run has passed step `beyond` and sends the signal; what it wrote on stderr."""
    deadline = time.monotonic() + 120
    while last_step(workdir) <= beyond and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(by)
    stderr = process.communicate(timeout=60)[1]
    assert last_step(workdir) < STEPS, "it was finished before it could be stopped"
    return stderr


def comparable(workdir: Path) -> list[dict]:
    """All records, without what depends on the clock or on where a process began."""
    return [
        {k: v for k, v in r.items() if k not in ("tokens_per_second", "mfu", "stall") and not k.endswith("/flips")}
        for r in metrics.read(workdir)
    ]


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    left_alone = start(straight)
    process = start(killed)
    stop(process, killed, 2 * EVERY + 5, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    last = start(killed)
    _, stderr = last.communicate(timeout=120)
    assert last.returncode == 0, stderr
    assert "resuming after step " in stderr.splitlines()[0]
    _, stderr = left_alone.communicate(timeout=120)
    assert left_alone.returncode == 0, stderr
    assert comparable(killed) == comparable(straight)
    assert same_bits(state_on_disk(killed, STEPS), state_on_disk(straight, STEPS))
    for name in (".", "checkpoints"):  # nothing is left of the save that the kill interrupted
        assert sorted(p.name for p in (killed / name).iterdir()) == sorted(p.name for p in (straight / name).iterdir())


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(tmp_path, by):
    workdir = tmp_path / "run"
    process = start(workdir, quick=True)
    stderr = stop(process, workdir, 3, by)
    assert process.returncode == STOPPED and "Traceback" not in stderr, stderr
    left = last_step(workdir)
    assert f"{by.name}: saved after step {left}; the same command continues from there" in stderr
    assert max(Checkpoints(workdir).steps()) == left
    process = start(workdir, quick=True)
    again = stop(process, workdir, left + 3, signal.SIGKILL)
    assert f"resuming after step {left}, " in again.splitlines()[0]
    steps = [r["step"] for r in metrics.read(workdir) if r["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)), "no step is missing, none is there twice"


def test_the_second_of_two_runs_in_a_folder_is_refused(tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, quick=True)
    while last_step(workdir) < 1 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # it would be finished before the second has started
    second = start(workdir, quick=True)
    _, stderr = second.communicate(timeout=120)
    assert second.returncode == 2 and f"{workdir} is in use by process {process.pid}: " in stderr
    process.kill()
    process.communicate()
    third = start(workdir, quick=True)
    stop(third, workdir, 5, signal.SIGKILL)
    assert last_step(workdir) > 5, "the lock ended with its process"
