"""Which checkpoints are made and which stay, on paper and on the disk."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_checkpoint import make_state

from spectra_jax.checkpoint import FOLDER, Checkpoints
from spectra_jax.retention import Plan
from spectra_jax.schema import Checkpoint, Config, Data, Train


def make(**values) -> Config:
    """16 tokens a step, 20 steps: the first steps past 100, 200 and 300 tokens are 7, 13 and 19."""
    settings = {"every_steps": 3, "keep": 2, "permanent_tokens": 100} | values
    return Config(data=Data(T=8, batch=2), train=Train(steps=20), checkpoint=Checkpoint(**settings))


def saves(config: Config) -> list[int]:
    plan = Plan(config)
    return [step for step in range(1, 21) if plan.saves(step)]


def test_what_is_saved():
    assert saves(make()) == [3, 6, 7, 9, 12, 13, 15, 18, 19, 20]
    assert saves(make(permanent_tokens=0)) == [3, 6, 9, 12, 15, 18, 20]
    assert saves(make(every_steps=100, permanent_final=False)) == [7, 13, 19, 20], "the last step always is"


def test_weights_alone_never_take_the_place_of_a_state():
    """A step that is due for both is followed by a full one."""
    config = make(every_steps=13, permanent_weights_only=True)
    plan = Plan(config)
    assert saves(config) == [7, 13, 14, 19, 20]
    assert [step for step in saves(config) if plan.weights_only(step)] == [7, 13, 19]
    assert saves(make(every_steps=1, permanent_weights_only=True)) == list(range(1, 21))
    assert not any(Plan(make()).weights_only(step) for step in range(1, 21))


@pytest.mark.parametrize(
    ("saved", "sound", "kept"),
    [
        ([3, 6, 9, 12], [], [3, 6, 9, 12]),  # nobody knows whether any of them is worth anything
        ([3, 6, 9, 12], [3], [3, 9, 12]),
        ([3, 6, 9, 12], [3, 6], [6, 9, 12]),
        ([3, 6, 9, 12], [3, 12], [9, 12]),
        ([3, 6, 7, 9, 12, 13, 15], [15], [7, 13, 15]),
        ([3], [3], [3]),
        ([7], [99], [7]),  # what was sound is gone
    ],
)
def test_what_is_kept(saved: Sequence[int], sound: Sequence[int], kept: Sequence[int]):
    assert sorted(Plan(make()).kept(saved, set(sound))) == kept


def test_what_is_kept_without_reading_back():
    plan = Plan(make(read_back=False))
    assert sorted(plan.kept([3, 6, 7, 9, 12], set())) == [7, 9, 12]
    assert sorted(plan.kept([3, 6, 7, 9, 12], {3})) == [7, 9, 12]


def test_weights_alone_are_not_counted():
    plan = Plan(make(permanent_weights_only=True, keep=1, read_back=False))
    assert sorted(plan.kept([3, 6, 7], set())) == [6, 7]


def settled(checkpoints: Checkpoints, step: int) -> None:
    """Saves, and waits for the reading back as well."""
    checkpoints.save(step, make_state(step), {})
    checkpoints.wait()
    while checkpoints.reading:
        time.sleep(0.05)


def on_disk(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / FOLDER).iterdir())


def spoil(step: Path) -> None:
    """Takes the values out of the parameters."""
    for path in step.glob("parameters/ocdbt.process_0/d/*"):
        path.write_bytes(bytes(path.stat().st_size))


def test_the_last_one_known_to_be_sound_is_never_deleted(tmp_path, capfd):
    """The disk spoils everything from step 6 on, before it is read back."""
    checkpoints = Checkpoints(tmp_path, make(keep=1, permanent_tokens=0))
    settled(checkpoints, 3)
    for step in (6, 9, 12):
        checkpoints.save(step, make_state(step), {})
        while not (tmp_path / FOLDER / str(step)).exists():
            time.sleep(0.001)
        spoil(tmp_path / FOLDER / str(step))
        while checkpoints.reading:
            time.sleep(0.05)
    checkpoints.close()
    assert on_disk(tmp_path) == [3, 9, 12] and capfd.readouterr().err.count("an older checkpoint stays") == 3
    checkpoints = Checkpoints(tmp_path, make(keep=1, permanent_tokens=0))
    settled(checkpoints, 15)
    settled(checkpoints, 18)
    checkpoints.close()
    assert on_disk(tmp_path) == [15, 18]
