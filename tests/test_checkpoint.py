"""Checkpoints come back bit for bit on any mesh; another tree, a full disk or a damaged file is named."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, environment, same_bits
from jax.sharding import PartitionSpec as P

from spectra_jax.checkpoint import FOLDER, Checkpoints
from spectra_jax.errors import UserError
from spectra_jax.record import git_commit, make_record
from spectra_jax.schema import Checkpoint, Config, Data, Train
from spectra_jax.sharding import AXES
from spectra_jax.stored import abstract, record_of

CONFIG = Config(
    data=Data(T=8, batch=2), train=Train(steps=20),
    checkpoint=Checkpoint(every_steps=3, keep=2, permanent_tokens=100, permanent_final=False, read_back=False),
)


def make_state(seed: int = 0) -> dict:
    """A state of the form that training saves, on one device."""
    rng = np.random.RandomState(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    parameters = {"blocks": {"q": {"w": draw(2, 8, 16)}, "norm": {"gain": draw(16)}}, "head": draw(8, 24)}
    return {
        "step": jnp.asarray(seed, jnp.int32), "parameters": parameters,
        "optimizer": ({"mu": jax.tree.map(jnp.square, parameters)}, jnp.asarray(7, jnp.int32)),
    }


def like(tree):
    """What `restore` is told about the wanted state, for one device."""
    return abstract(jax.eval_shape(lambda: tree), jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1]))


def saved(workdir: Path, steps: int = 1) -> Checkpoints:
    """Checkpoints 3, 6, ... of these states, still open."""
    checkpoints = Checkpoints(workdir, CONFIG)
    for k in range(1, steps + 1):
        checkpoints.save(3 * k, make_state(3 * k), {"config": {"k": k}})
    checkpoints.wait()
    return checkpoints


def test_everything_comes_back(tmp_path):
    state = make_state(3)
    record = make_record({"model": {"L": 2}, "sets": ["a", "b"]}, 12345, "f" * 64)
    writing = Checkpoints(tmp_path, CONFIG)
    writing.save(3, state, record)
    writing.close()
    reading = Checkpoints(tmp_path)
    assert reading.steps() == [3] and record_of(reading.path(3)).items() >= record.items()
    assert same_bits(reading.restore(3, like(state)), state)
    assert same_bits(reading.restore_parameters(3, like(state["parameters"])), state["parameters"])


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    state, expected = make_state(3), jax.device_get(make_state(3))
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(3, state, {})
    changed = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    checkpoints.wait()
    assert same_bits(checkpoints.restore(3, like(changed)), expected)


def test_what_is_saved_and_what_is_kept(tmp_path):
    # 16 tokens a step: the first steps past 100, 200 and 300 tokens are 7, 13 and 19; 20 is the last.
    assert CONFIG.permanent_steps == (7, 13, 19)
    checkpoints, state, seen = Checkpoints(tmp_path, CONFIG), make_state(), []
    for step in range(1, 21):
        if checkpoints.plan.saves(step):
            checkpoints.save(step, state, {})
            checkpoints.wait()
            seen.append((step, checkpoints.steps()))
    assert [step for step, _ in seen] == [3, 6, 7, 9, 12, 13, 15, 18, 19, 20]
    assert dict(seen) == {
        3: [3], 6: [3, 6], 7: [6, 7], 9: [7, 9], 12: [7, 9, 12], 13: [7, 12, 13], 15: [7, 13, 15],
        18: [7, 13, 15, 18], 19: [7, 13, 18, 19], 20: [7, 13, 19, 20],
    }
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / FOLDER).iterdir()) == [7, 13, 19, 20]


def test_parameters_alone(tmp_path):
    """Evaluation reads them without the optimizer: it works where the rest of the checkpoint is gone."""
    saved(tmp_path).close()
    for path in (tmp_path / FOLDER / "3" / "training").rglob("*"):
        if path.is_file():
            path.unlink()
    parameters = make_state(3)["parameters"]
    assert same_bits(Checkpoints(tmp_path).restore_parameters(3, like(parameters)), parameters)


@pytest.mark.parametrize("after", [(1, 4, 2), (1, 1, 1), (2, 2, 2)])
def test_restored_onto_another_mesh(tmp_path, after):
    state = make_state(3)
    specs = {0: P(), 1: P("data"), 2: P("data", "model"), 3: P(None, "data", "model")}

    def shapes(mesh):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, specs[x.ndim])), state
        )

    first = shapes(jax.make_mesh((1, 8, 1), AXES))
    second = shapes(jax.make_mesh(after, AXES, devices=jax.devices()[: np.prod(after)]))
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(3, jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, first), {})
    checkpoints.wait()
    restored = checkpoints.restore(3, second)
    assert same_bits(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda s: s.sharding, second)


def change(path: str, leaf) -> dict:
    """The state with one leaf replaced, or removed for None."""
    state = make_state(3)
    *outer, last = path.split(".")
    node = state
    for name in outer:
        node = node[name]
    if leaf is None:
        del node[last]
    else:
        node[last] = leaf
    return state


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("parameters.head", jnp.zeros((8, 32)), r"head: the checkpoint has float32\[8, 24\], .* float32\[8, 32\]"),
        ("parameters.head", jnp.zeros((8, 24), jnp.bfloat16), r"has float32\[8, 24\], the config asks for bfloat16"),
        ("parameters.head", None, r"head: the checkpoint has float32\[8, 24\], the config asks for nothing"),
        ("parameters.tail", jnp.zeros(3), r"parameters.tail: the checkpoint has nothing, .* asks for float32\[3\]"),
        ("parameters.blocks.q.w", jnp.zeros((4, 8, 16)), r"blocks.q.w: .*float32\[2, 8, 16\], .*float32\[4, 8, 16\]"),
        ("extra", jnp.zeros(()), r"training.extra: the checkpoint has nothing, the config asks for float32\[\]"),
    ],
)
def test_another_tree_shape_or_dtype_is_named(tmp_path, path, leaf, message):
    checkpoints = saved(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        checkpoints.restore(3, like(change(path, leaf)))
    text = str(error.value)
    assert f"{FOLDER}/3 is of another model or optimizer" in text and "config.json" in text
    assert text.count("the checkpoint has") == 1  # nothing else differs


def test_many_differences_are_counted(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    state = {"parameters": {f"p{k}": jnp.zeros(2) for k in range(20)}, "step": jnp.asarray(0)}
    checkpoints.save(3, state, {})
    checkpoints.wait()
    with pytest.raises(UserError, match=r"p0: .*\n(.*\n){7}  and 12 more\n"):
        checkpoints.restore(3, like({**state, "parameters": {f"p{k}": jnp.zeros(3) for k in range(20)}}))


def test_no_checkpoints(tmp_path):
    with pytest.raises(UserError, match="checkpoints does not exist: .*holds no checkpoints"):
        Checkpoints(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert Checkpoints(tmp_path, CONFIG).steps() == []


@pytest.mark.parametrize("name", ["run", f"run/{FOLDER}"])
def test_a_file_in_the_way(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with pytest.raises(UserError, match=f"cannot open .*run/{FOLDER}: .*use another --workdir"):
        Checkpoints(tmp_path / "run", CONFIG)
    assert path.read_text() == "precious"


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b""], ids=["cut short", "empty"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    saved(tmp_path, steps=2).close()
    (path,) = (tmp_path / FOLDER / "6" / "parameters").glob("ocdbt.process_0/d/*")
    path.write_bytes(damage(path.read_bytes()))
    checkpoints = Checkpoints(tmp_path, CONFIG)
    with pytest.raises(UserError, match=rf"{FOLDER}/6 is damaged: .* There are checkpoints of steps \[3, 6\]"):
        checkpoints.restore(6, like(make_state()))
    assert same_bits(checkpoints.restore(3, like(make_state())), make_state(3))


FULL = """
import resource, sys
import jax.numpy as jnp, numpy as np
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.errors import UserError
from spectra_jax.schema import Checkpoint, Config, Train

checkpoints = Checkpoints(sys.argv[1], Config(train=Train(steps=9), checkpoint=Checkpoint(every_steps=1, keep=3)))
def save(step, size):
    values = np.random.RandomState(step).standard_normal(size)  # cannot be compressed
    checkpoints.save(step, {"parameters": {"w": jnp.asarray(values, jnp.float32)}, "step": jnp.asarray(step)}, {})
    checkpoints.wait()
save(1, 1000)
# No file may grow past 150 kB: the second save fails as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
try:
    save(2, 1_000_000)
except UserError as error:
    print("UserError:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_disk_that_fills_up(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"UserError: could not save a checkpoint in {tmp_path / FOLDER}: " in done.stdout
    assert "File too large" in done.stdout and "Earlier checkpoints are intact" in done.stdout
    # A write that outlives the event loop it reports to may complain once or twice; the failure itself is told once.
    assert "orbax" not in done.stderr and len(done.stderr.splitlines()) < 30, "not the logs of every thread"
    # Nothing of the second save has a final name, and the first can be read.
    config = Config(train=Train(steps=9), checkpoint=Checkpoint(every_steps=1, keep=3))
    assert Checkpoints(tmp_path).steps() == [1]
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir() if "tmp" not in p.name) == ["1"]
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(2, make_state(), {})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["1", "2"]  # the leftovers are cleaned up
    w = Checkpoints(tmp_path).restore_parameters(1, like({"w": jnp.zeros(1000, jnp.float32)}))["w"]
    assert np.array_equal(w, np.random.RandomState(1).standard_normal(1000).astype(np.float32))


def test_the_record_says_what_made_it():
    record = make_record({"seed": 3}, 1000, "abc")
    assert json.loads(json.dumps(record)) == record
    assert (record["config"], record["tokens"], record["data_fingerprint"]) == ({"seed": 3}, 1000, "abc")
    assert record["versions"]["jax"] == jax.__version__ and record["versions"]["grain"] == version("grain")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    commit = head.stdout.strip() if head.returncode == 0 else "unknown"
    assert record["git_commit"].removesuffix("+changes") == commit


def test_the_commit_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert git_commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert git_commit() == "unknown"
