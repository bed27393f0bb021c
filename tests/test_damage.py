"""A checkpoint with any bit or file changed is noticed, set aside and replaced by the one before, or was unharmed."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same_bits
from test_checkpoint import CONFIG, like, make_state, saved

from spectra_jax.checkpoint import FOLDER, Checkpoints
from spectra_jax.errors import UserError
from spectra_jax.record import Damaged
from spectra_jax.stored import verify


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A workdir with checkpoints of steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("damage") / "run"
    saved(workdir, steps=2).close()
    return workdir


def files(workdir: Path, step: int = 6) -> list[Path]:
    """Every file of a checkpoint."""
    return sorted(path for path in (workdir / FOLDER / str(step)).rglob("*") if path.is_file())


def outcome(workdir: Path) -> int:
    """The step that was restored, which must hold what was saved at that step."""
    checkpoints = Checkpoints(workdir, CONFIG)
    step, state = checkpoints.restore_newest(like(make_state()))
    checkpoints.close()
    assert same_bits(state, make_state(step)), f"step {step} was restored wrong"
    aside = workdir / FOLDER / "6.damaged"
    assert aside.is_dir() == (step == 3), "what is damaged is kept, but under another name"
    return step


def flip(path: Path, rng: np.random.RandomState) -> str:
    """Flips one bit and says which."""
    data = bytearray(path.read_bytes())
    at = rng.randint(8 * len(data))
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    return f"bit {at} of {len(data)} bytes"


def test_one_flipped_bit_is_never_restored(original, tmp_path):
    """60 bits: at least two in every file, the rest spread by size."""
    rng = np.random.RandomState(0)
    names = [path.relative_to(original) for path in files(original) if path.stat().st_size]
    sizes = np.array([(original / name).stat().st_size for name in names], float)
    picks = 2 * names + [names[i] for i in rng.choice(len(names), max(60 - 2 * len(names), 0), p=sizes / sizes.sum())]
    detected = 0
    for number, name in enumerate(picks):
        workdir = Path(shutil.copytree(original, tmp_path / str(number)))
        what = flip(workdir / name, rng)
        try:
            detected += outcome(workdir) == 3
        except AssertionError as error:
            raise AssertionError(f"{name}: {what}: {error}") from error
    assert len(picks) >= 60 and detected > len(picks) / 3  # all that matters is in there somewhere


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda step: [p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]) for p in step.rglob("*/d/*")],
    "emptied": lambda step: [path.write_bytes(b"") for path in step.rglob("*/d/*")],
    "zeroed": lambda step: [path.write_bytes(bytes(path.stat().st_size)) for path in step.rglob("*/d/*")],
    "arrays missing": lambda step: [path.unlink() for path in step.rglob("*/d/*")],
    "parameters missing": lambda step: shutil.rmtree(step / "parameters"),
    "training missing": lambda step: shutil.rmtree(step / "training"),
    "all missing": lambda step: [shutil.rmtree(step), step.mkdir()],
    "no record": lambda step: (step / "record" / "record.json").unlink(),
    "record cut": lambda step: (step / "record" / "record.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(original, tmp_path, damage, capfd):
    workdir = Path(shutil.copytree(original, tmp_path / "run"))
    DAMAGES[damage](workdir / FOLDER / "6")
    assert outcome(workdir) == 3
    assert f"{FOLDER}/6 is damaged: " in (said := capfd.readouterr().err) and "set aside as" in said
    assert Checkpoints(workdir).steps() == [3]


def test_a_wrong_array_is_named(original, tmp_path):
    """The array is a valid one, but of another step."""
    workdir = Path(shutil.copytree(original, tmp_path / "run"))
    shutil.rmtree(workdir / FOLDER / "6" / "parameters")
    shutil.copytree(workdir / FOLDER / "3" / "parameters", workdir / FOLDER / "6" / "parameters")
    match = "checksums do not hold for parameters: blocks.norm.gain, blocks.q.w, head"
    with pytest.raises(Damaged, match=match):
        Checkpoints(workdir).restore(6, like(make_state()))
    with pytest.raises(Damaged, match=match):
        verify(workdir / FOLDER / "6")
    verify(workdir / FOLDER / "3")


def test_none_is_left(original, tmp_path):
    workdir = Path(shutil.copytree(original, tmp_path / "run"))
    for step in (3, 6):
        DAMAGES["emptied"](workdir / FOLDER / str(step))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used; .*6.damaged, .*3.damaged"):
        Checkpoints(workdir, CONFIG).restore_newest(like(make_state()))


def test_another_model_is_not_damage(original, tmp_path):
    """A checkpoint that does not fit the config stays where it is."""
    workdir = Path(shutil.copytree(original, tmp_path / "run"))
    other = make_state() | {"extra": jnp.zeros(3)}
    with pytest.raises(UserError, match="is of another model or optimizer"):
        Checkpoints(workdir, CONFIG).restore_newest(like(other))
    assert Checkpoints(workdir).steps() == [3, 6]
    assert subprocess.run(["ls", workdir / FOLDER], capture_output=True, text=True).stdout.split() == ["3", "6"]
