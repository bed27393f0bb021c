"""One run in several processes, as on the hosts of a pod: one is stopped, killed, frozen or reads other bytes.

Two processes of two CPU devices each, with collectives over sockets.
"""

import shutil
import signal
from pathlib import Path

import pytest
from helpers import same_bits, state_on_disk
from trainer import Trainer, last_step, losses, start

from spectra_jax.cli import STOPPED

pytestmark = pytest.mark.slow
STEPS = 70
OVERRIDES = (f"train.steps={STEPS}", "checkpoint.every_steps=20", "checkpoint.keep=2")


def two(workdir: Path, *overrides: str) -> Trainer:
    return start(workdir, *OVERRIDES, *overrides, processes=2, devices=2)


def finish(run: Trainer) -> list[str]:
    """What each process said; all must end well."""
    ended = run.end()
    assert [status for status, _ in ended] == [0] * len(ended), ended
    return [said for _, said in ended]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    workdir = tmp_path_factory.mktemp("processes") / "alone"
    finish(two(workdir))
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run of which one process was killed between the saves of steps 40 and 60."""
    workdir = tmp_path_factory.mktemp("processes") / "killed"
    (status, said), (other, _) = two(workdir).beyond(45).send(signal.SIGKILL, to=1).end()
    assert other == -signal.SIGKILL and status not in (0, STOPPED), "the survivor must not wait for ever"
    assert 45 < last_step(workdir) < 60, said
    return workdir


def test_a_signal_to_one_stops_both_after_the_same_step(tmp_path, alone):
    workdir = tmp_path / "run"
    ended = two(workdir).beyond(30).send(signal.SIGTERM, to=1).end()
    left = last_step(workdir)
    for status, said in ended:
        assert status == STOPPED and f"saved after step {left}; the same command continues" in said, said
    said, _ = finish(two(workdir))
    assert f"resuming after step {left}," in said
    assert losses(workdir) == losses(alone)
    assert same_bits(state_on_disk(workdir, STEPS), state_on_disk(alone, STEPS))


def test_killed_and_resumed_is_bit_equal(tmp_path, alone, killed):
    workdir = Path(shutil.copytree(killed, tmp_path / "run"))
    said, _ = finish(two(workdir))
    assert "resuming after step 40," in said
    assert losses(workdir) == losses(alone)
    assert same_bits(state_on_disk(workdir, STEPS), state_on_disk(alone, STEPS))


@pytest.mark.parametrize(("processes", "devices", "mesh"), [(1, 2, "data=2"), (4, 1, "data=4"), (1, 4, "model=2")])
def test_resumed_on_another_mesh(tmp_path, alone, killed, processes, devices, mesh):
    workdir = Path(shutil.copytree(killed, tmp_path / "run"))
    said, *_ = finish(start(workdir, *OVERRIDES, f"mesh.{mesh}", processes=processes, devices=devices))
    assert "resuming after step 40," in said
    found, expected = losses(workdir), losses(alone)
    assert found[:40] == expected[:40]
    assert found[40:60] == pytest.approx(expected[40:60], rel=1e-5)


def test_one_that_cannot_read_a_checkpoint_takes_the_other_back(tmp_path, killed):
    """The part of process 1 of the newest checkpoint is cut short: both go on from the one before."""
    workdir = Path(shutil.copytree(killed, tmp_path / "run"))
    for path in (workdir / "checkpoints" / "40").glob("*/ocdbt.process_1/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    one, other = finish(two(workdir))
    assert "40 is damaged" in one + other and "set aside as" in one
    assert "resuming after step 20," in one
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"40.damaged", "70"}


def test_one_that_stands_still_is_noticed(tmp_path):
    """The watchdog of the other bites long before JAX takes the silent one for dead."""
    run = two(tmp_path / "run", "train.heartbeat_seconds=100", "train.stuck_seconds=20").beyond(10)
    run.send(signal.SIGSTOP, to=1)
    said = run.processes[0].communicate(timeout=90)[1]
    run.send(signal.SIGKILL, to=1).processes[1].communicate()
    assert run.processes[0].returncode == 1 and "Timeout (0:00:20)" in said and "train/loop.py" in said
