"""`python -m spectra_jax.train`, killed and started again: the same bits as a run that was left alone."""

import signal

import pytest
from helpers import same_bits, state_on_disk
from trainer import EVERY, STEPS, comparable, last_step, losses, start

from spectra_jax.checkpoint import Checkpoints
from spectra_jax.cli import STOPPED


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [(), ("optimizer.name=adamw8bit", "optimizer.float_below=1024")], ids=["adamw", "adamw8bit"]
)
def test_killed_and_resumed_is_bit_equal(tmp_path, overrides):
    """Compiled as users' runs are: a resumed run compiles again, and must get the same programs."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    left_alone = start(straight, *overrides, quick=False)
    start(killed, *overrides, quick=False).stop(2 * EVERY + 5, signal.SIGKILL)
    ((status, said),) = start(killed, *overrides, quick=False).end()
    assert status == 0, said
    assert "resuming after step " in said.splitlines()[0]
    ((status, said),) = left_alone.end()
    assert status == 0, said
    assert comparable(killed) == comparable(straight)
    assert same_bits(state_on_disk(killed, STEPS), state_on_disk(straight, STEPS))
    for name in (".", "checkpoints"):  # nothing is left of the save that the kill interrupted
        assert sorted(p.name for p in (killed / name).iterdir()) == sorted(p.name for p in (straight / name).iterdir())


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(tmp_path, by):
    workdir = tmp_path / "run"
    ((status, said),) = start(workdir).beyond(3).send(by).end()
    left = last_step(workdir)
    assert status == STOPPED and "Traceback" not in said and left < STEPS, said
    assert f"{by.name}: saved after step {left}; the same command continues from there" in said
    assert max(Checkpoints(workdir).steps()) == left
    again = start(workdir).stop(left + 3, signal.SIGKILL)
    assert f"resuming after step {left}, " in again.splitlines()[0]
    assert len(losses(workdir)) > left + 3


def test_a_second_signal_leaves_at_once(tmp_path):
    run = start(tmp_path / "run").beyond(3)
    run.send(signal.SIGSTOP).send(signal.SIGTERM).send(signal.SIGINT).send(signal.SIGCONT)  # both before it looks
    ((status, said),) = run.end()
    assert status in (128 + signal.SIGTERM, 128 + signal.SIGINT), said


def test_the_second_of_two_runs_in_a_folder_is_refused(tmp_path):
    workdir = tmp_path / "run"
    run = start(workdir).beyond(0).send(signal.SIGSTOP)  # it would be finished before the second has started
    ((status, said),) = start(workdir).end()
    assert status == 2 and f"{workdir} is in use by process {run.processes[0].pid}: " in said
    run.send(signal.SIGKILL).end()
    start(workdir).stop(5, signal.SIGKILL)
    assert last_step(workdir) > 5, "the lock ended with its process"
