"""What a user can get wrong about a run: one message with the numbers and the fix, and nothing half-written.

Bad input files are in tests/data (sources, prepare, loader), mistakes in configs in test_config.py and
test_sharding.py, damaged checkpoints in test_checkpoint.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import pytest
from helpers import (
    ROOT,
    STEPS,
    TERNARY,
    TINY,
    T,
    arguments,
    copy_of,
    data,
    environment,
    prepare_set,
    spectra,
    tiny,
    trained,
)

from spectra_jax import cli, metrics
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.train.loop import train
from spectra_jax.train.workdir import read_config


def command(workdir: Path, *overrides: str) -> list[str]:
    """A training run as a user types it, tiny."""
    return [
        "train", f"--config={ROOT}/configs/quickstart.py:FloatLM", f"--workdir={workdir}",
        f"--config.data.sets={data()}", *arguments([*TINY, *overrides]),
    ]


# Before anything is written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lyers=3", "unknown key config.model.lyers"),
        ("modle.L=3", "unknown key config.modle.L; did you mean config.model.L?"),
        ("model.L=three", "config.model.L='three' is not of type int"),
        ("optimizer.weight_decay=on", "config.optimizer.weight_decay='on' is not of type float"),
        ("model.weight=ternery", "config.model.weight='ternery' is not one of float, ternary, binary, bitnet158, "
                                 "dlt, lrqat, sparse, bitlinear; did you mean ternary?"),
        ("model.attention=flesh", "config.model.attention='flesh' is not one of"),
        ("model.remat=all", "config.model.remat='all' is not one of"),
        ("schedule.shape=cosin", "did you mean cosine?"),
        ("model.N=3", "config.model.N=3 is not divisible by config.model.K=2"),
        ("model.scale_shards=3", "F=64 is not divisible by config.model.scale_shards=3"),
        ("data.batch=12", "in 1 microbatches of 12 is not divisible by the data axes (1 x 8); use 16"),
        ("train.accumulate=3", "config.data.batch=8 is not divisible by config.train.accumulate=3; use"),
        ("train.accumulate=2", "in 2 microbatches of 4 is not divisible by the data axes (1 x 8); use 16"),
        ("mesh.data=3", "data=3, model=1: the axes do not make up 8 devices; use divisors of it, [1, 2, 4, 8]"),
        ("mesh.model=8", "config.model.N=4 is not divisible by the model axis (8)"),
        ("model.D=36", "config.model.D=36 is not divisible by the data axis (8)"),
        ("data.T=32", "holds records of T=16 tokens, the run asks for T=32; prepare it again with --context=32 or set "
                      "--config.data.T=16"),
        ("model.V=256", "was tokenized with a vocabulary of 295, the model has V=256"),
        ("data.sets=nowhere", "nowhere is no prepared set: it has no manifest.json"),
        ("data.sets=", "config.data.sets is empty; name prepared sets"),
    ],
)
def test_nothing_is_written(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        cli.run(command(tmp_path / "run", override))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# Data that turn out bad during training


def break_record(folder: Path, steps: range) -> int:
    """Flips one bit of a shard: one record becomes unreadable, and is first needed in one of these steps (from 0)."""
    loader = Loader([(folder, 1.0)], split="train", T=T, B=8, V=304, seed=0)
    stored = [record.tobytes() for record in loader.records(0, len(loader))]
    needed = [row.tobytes() for step in range(STEPS) for row in loader.batch_at(step)]
    first = [needed.index(record) // 8 for record in stored]
    start = 0
    for path in sorted(folder.glob("train-*")):
        good, failing = path.read_bytes(), []
        for at in (i for i, byte in enumerate(good) if byte):  # the rest is padding
            path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
            try:
                source = grain.sources.ArrayRecordDataSource([str(path)])
            except RuntimeError:
                continue
            failing = [k for k in range(len(source)) if not readable(source, k)]
            if len(failing) == 1 and first[start + failing[0]] in steps:
                return first[start + failing[0]]
        path.write_bytes(good)
        start += len(grain.sources.ArrayRecordDataSource([str(path)]))
    raise AssertionError("no such bit")


def readable(source: grain.sources.ArrayRecordDataSource, index: int) -> bool:
    """Whether ArrayRecord finds nothing wrong with a record."""
    try:
        return bool(source[index])
    except RuntimeError:
        return False


def test_a_corrupt_shard_stops_the_run_where_it_is_read(tmp_path):
    """What came before stays; with the shard repaired the run goes on as if nothing had been."""
    folder, workdir = copy_of(data(), tmp_path / "data"), tmp_path / "run"
    config = tiny(*TERNARY, f"data.sets={folder}")
    step = break_record(folder, range(5, 7))
    with pytest.raises(UserError, match=r"record \d+ of .*train-\d{5}.arrayrecord is corrupt: .*copy the shard again"):
        train(config, workdir)
    assert max(r["step"] for r in metrics.read(workdir)) <= step
    assert Checkpoints(workdir).steps() == [4, 5]
    shutil.copytree(data(), folder, dirs_exist_ok=True)
    train(config, workdir)
    losses = [[r["loss"] for r in metrics.read(run) if r["kind"] == "train"] for run in (workdir, trained(*TERNARY))]
    assert losses[0] == losses[1]


def test_token_ids_beyond_the_vocabulary(tmp_path):
    """A manifest that states less than its records hold."""
    folder = copy_of(data(), tmp_path / "data")
    content = json.loads((folder / "manifest.json").read_text())
    content["vocab_size"] = 256
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"record \d+ of .* holds the token id \d+, the model's vocabulary ends at 255"):
        train(tiny("model.V=256", f"data.sets={folder}"), tmp_path / "run")
    assert Checkpoints(tmp_path / "run").steps() == []


# A workdir that is not this run's


def test_a_changed_config_is_refused_by_name(tmp_path):
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError) as error:
        train(tiny(*TERNARY, "schedule.peak=0.02", "seed=3", "model.L=3"), workdir)
    assert str(error.value) == (
        f"{workdir} holds another run; these differ:\n"
        "  model.L: 2 -> 3\n  schedule.peak: 0.01 -> 0.02\n  seed: 0 -> 3\n"
        "use a new --workdir, or --accept-changes to continue this run with the new values"
    )
    assert (workdir / "config.json").read_text() == before


def test_changed_data_are_refused(tmp_path):
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    other = prepare_set(tmp_path / "other", seed=9, tokenizer=str(workdir / "tokenizer.json"))
    with pytest.raises(UserError, match=r"these differ:\n  data fingerprint: \w{12} -> \w{12}\nuse a new --workdir"):
        train(tiny(*TERNARY, f"data.sets={other}"), workdir)
    # The same data under another name are the same data.
    moved = copy_of(data(), tmp_path / "moved")
    train(tiny(*TERNARY, f"data.sets={moved}"), workdir)


def test_what_is_written_down_may_change(tmp_path):
    """And where: none of it is the run's mathematics."""
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    train(tiny(*TERNARY, "metrics.every_steps=5", "checkpoint.keep=3", "evaluate.batches=2", "name=other"), workdir)
    assert read_config(workdir).name == "other"


def test_accepted_changes(tmp_path):
    """The run goes on from its newest checkpoint with the new values."""
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    longer = tiny(*TERNARY, f"train.steps={STEPS + 2}", "optimizer.clip=0.5")
    with pytest.raises(UserError, match="optimizer.clip: 1.0 -> 0.5\n  train.steps: 12 -> 14\n"):
        train(longer, workdir)
    last = train(longer, workdir, accept_changes=True)
    assert last["train"]["step"] == STEPS + 2 and read_config(workdir) == longer
    old, new = (
        [(r["step"], r["loss"]) for r in metrics.read(run) if r["kind"] == "train"]
        for run in (trained(*TERNARY), workdir)
    )
    assert new[:STEPS] == old and [step for step, _ in new] == list(range(1, STEPS + 3))


def test_accepted_changes_that_do_not_fit_the_checkpoint(tmp_path):
    """Another shape cannot be accepted: it is the checkpoint that does not fit."""
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    with pytest.raises(UserError, match=r"/12 is of another model or optimizer:\n  .*\[2, .* asks for .*\[3, "):
        train(tiny(*TERNARY, "model.L=3"), workdir, accept_changes=True)


def test_a_damaged_config_file(tmp_path):
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    for content in ("{", "[]", '{"config": {}}', '{"config": 3, "data_fingerprint": ""}'):
        (workdir / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config.json is damaged \(.*\); restore it or use another --workdir"):
            train(tiny(*TERNARY), workdir)


# Places that cannot be written


@pytest.mark.parametrize(
    "name", ["run", "run/checkpoints", "run/metrics.jsonl/", "run/config.json/", "run/tokenizer.json/"]
)
def test_something_in_the_way(tmp_path, name):
    """A file for a folder, or a folder for a file. (Permissions do not stop the tests' user where that is root.)"""
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir(parents=True)
        path = path / "precious"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    with pytest.raises(UserError, match="cannot (write|open) .*run.*; .*use .*--workdir"):
        train(tiny(*TERNARY), tmp_path / "run")
    assert path.read_text() == "precious"
    left = [p.name for p in (tmp_path / "run").rglob("*")] if (tmp_path / "run").is_dir() else []
    assert not [n for n in left if n.startswith(".") or n.endswith(str(os.getpid()))], f"temporary files stayed: {left}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full /dev/full")
def test_a_full_disk_ends_the_run(tmp_path):
    """In a process of its own: status 2, one line, and the checkpoints of before are intact."""
    workdir = copy_of(trained(*TERNARY), tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "12")
    (workdir / "metrics.jsonl").unlink()
    (workdir / "metrics.jsonl").symlink_to("/dev/full")
    done = spectra(*command(workdir, *TERNARY, "family=FloatLM"), "--accept-changes")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: cannot write {workdir}/metrics.jsonl: No space left on device; free some space or use a --workdir "
        "open to you"
    )
    assert "Traceback" not in done.stderr
    assert Checkpoints(workdir).steps() == [4, 8]


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # no file may grow past this
from spectra_jax.cli import main
main()
"""


def test_a_disk_that_is_full_at_the_first_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, *command(tmp_path / "run")], env=environment(), cwd=ROOT, capture_output=True,
        text=True, check=False,
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"error: could not save a checkpoint in {tmp_path}/run/checkpoints: ")
    assert "File too large" in lines[-1] and "Traceback" not in done.stderr
    assert Checkpoints(tmp_path / "run").steps() == []
