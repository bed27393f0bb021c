"""metrics.jsonl and its mirrors."""

import json
import math
import os
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import environment

from spectra_jax import metrics
from spectra_jax.errors import UserError
from spectra_jax.metrics import MetricsWriter


def _refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_records_come_back_as_strict_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": jnp.float32(2.5), "tokens": np.int64(4096), "lr": 1e-3})
        writer.write(1, "weights", {"q": {"zeros": 0.25, "flips": None}, "up": {"zeros": 0.5}})
        writer.event(1, "peak lowered", lr=5e-4)
        writer.write(2, "train", {"loss": math.nan, "grad_norm": -math.inf, "lr": 1e-3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=_refuse) for line in lines]
    assert metrics.read(tmp_path) == strict == [
        {"step": 1, "kind": "train", "loss": 2.5, "tokens": 4096, "lr": 1e-3},
        {"step": 1, "kind": "weights", "q/zeros": 0.25, "q/flips": None, "up/zeros": 0.5},
        {"step": 1, "kind": "event", "name": "peak lowered", "lr": 5e-4},
        {"step": 2, "kind": "train", "loss": None, "grad_norm": None, "lr": 1e-3,
         "nonfinite": ["loss", "grad_norm"]},
    ]


def test_a_record_is_on_file_before_the_next_call(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0})  # neither flushed nor closed: what kill -9 would leave
    assert metrics.read(tmp_path) == [{"step": 1, "kind": "train", "loss": 1.0}]
    writer.flush()
    writer.close()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "values"),
    [("training", {"loss": 1.0}), ("train", {"step": 3}), ("train", {"nonfinite": 3})],
)
def test_wrong_calls_are_refused_and_write_nothing(tmp_path, kind, values):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError):
        writer.write(1, kind, values)
    assert metrics.read(tmp_path) == []


def test_a_disabled_writer_touches_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.event(1, "decay removed")
        writer.flush()
    assert not (tmp_path / "run").exists()


def _five_steps(workdir):
    with MetricsWriter(workdir) as writer:
        for step in range(1, 6):
            writer.write(step, "train", {"loss": float(step)})
    return workdir / "metrics.jsonl"


def test_resume_drops_later_records_and_a_torn_line(tmp_path):
    path = _five_steps(tmp_path)
    path.write_bytes(path.read_bytes() + b'{"step": 6, "kind": "tr')
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, "train", {"loss": 40.0})
    assert [r["loss"] for r in metrics.read(tmp_path)] == [1.0, 2.0, 3.0, 40.0]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("resume_step", "steps"), [(None, [1, 2, 3, 4, 5]), (-1, []), (2, [1, 2]), (9, [1, 2, 3, 4, 5])]
)
def test_what_each_resume_step_keeps(tmp_path, resume_step, steps):
    path = _five_steps(tmp_path)
    path.write_bytes(path.read_bytes() + b"{")
    MetricsWriter(tmp_path, resume_step=resume_step).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == steps


def test_a_whole_last_line_without_newline_is_kept_whole(tmp_path):
    path = _five_steps(tmp_path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with MetricsWriter(tmp_path) as writer:
        writer.write(6, "train", {"loss": 6.0})
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad", [b"{nonsense\n", b"3\n", b'{"kind": "train"}\n', b"\xff\xfe\n"])
def test_damage_elsewhere_names_the_line_and_changes_nothing(tmp_path, bad):
    path = _five_steps(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = bad
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="line 2 is damaged"):
        metrics.read(tmp_path)
    with pytest.raises(UserError, match="line 2 is damaged"):
        MetricsWriter(tmp_path, resume_step=3)
    assert path.read_bytes() == b"".join(lines)


def test_missing_metrics_and_unusable_workdir(tmp_path):
    with pytest.raises(UserError, match="cannot read .*metrics.jsonl: No such file"):
        metrics.read(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*use a --workdir"):
        MetricsWriter(tmp_path / "file")


HALF_A_LINE = """
import resource, sys
from spectra_jax.errors import UserError
from spectra_jax.metrics import MetricsWriter

writer = MetricsWriter(sys.argv[1])
writer.write(1, "train", {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))  # room for half of the second line
try:
    writer.write(2, "train", {"loss": 2.0})
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.write(3, "train", {"loss": 3.0})
"""


def test_a_line_that_did_not_fit_leaves_no_half(tmp_path):
    command = [sys.executable, "-c", HALF_A_LINE, tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "cannot write" in done.stdout, done.stderr
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always full /dev/full")
def test_a_full_disk_gives_one_message(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(UserError, match="No space left on device; free some space"):
            writer.write(1, "train", {"loss": 1.0})


@pytest.mark.parametrize(
    ("mirror", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_mirror_that_is_not_installed_names_the_command(tmp_path, monkeypatch, mirror, module):
    monkeypatch.setitem(sys.modules, module, None)  # what the import system does for "not there"
    with pytest.raises(UserError, match=f"pip install {module}"):
        MetricsWriter(tmp_path, **{mirror: True})


def test_tensorboard_files_hold_the_records(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path, tensorboard=True, resume_step=6) as writer:
        writer.write(7, "train", {"loss": 2.5})
        writer.write(7, "weights", {"q": {"zeros": 0.25, "flips": None}})
        writer.event(7, "peak lowered")
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, scalars, events = file.read_bytes(), {}, []
    while content:  # a record: length, its checksum, payload, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    for event in events:
        for value in event.summary.value:
            scalars[value.tag] = (event.step, value.simple_value)
    assert scalars["train/loss"] == (7, 2.5)
    assert scalars["weights/q/zeros"] == (7, 0.25)
    assert any("event/name" in tag for tag in scalars)
    assert 7 in [event.step for event in events if event.HasField("session_log")]  # the purge


def test_wandb_run_continues_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the mirror's own package: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in range(2):
        resume_step = 5 if start else None
        with MetricsWriter(
            tmp_path, wandb=True, run_name="tiny", config={"L": 2}, resume_step=resume_step
        ) as writer:
            writer.write(5 + start, "train", {"loss": 2.5})
            writer.event(5 + start, "peak lowered")
    run_id = (tmp_path / "wandb_id").read_text()
    runs = [p.name for p in (tmp_path / "wandb").iterdir() if p.name.startswith("offline-run-")]
    assert runs and all(name.endswith(run_id) for name in runs)
    assert [record["step"] for record in metrics.read(tmp_path)] == [5, 5, 6, 6]
