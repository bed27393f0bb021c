"""What `prepare` refuses or cannot finish, and that nothing is lost by it; what it shows while it works."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import make_texts
from test_prepare import PREPARE, ROOT, T, children, content, edit, interrupted, run, start

from spectra_jax.data.prepare import Manifest, prepare
from spectra_jax.errors import UserError


@pytest.mark.parametrize("change, message", [
    ({"T": 64}, "T is 32 there and 64 here"),
    ({"tokenizer": "train:500"}, "tokenizer is 'train:400' there and 'train:500' here"),
    ({"validation_percent": 20.0}, "validation_percent is 10.0 there and 20.0 here"),
    ({"licence": "MIT"}, "source 0.jsonl: licence is 'CC0' there and 'MIT' here"),
    (lambda corpus: edit(corpus / "1.jsonl"), "source 1.jsonl: sha256 is"),
    (lambda corpus: (corpus / "1.jsonl").unlink(), "source 1.jsonl is only there"),
])
def test_other_settings_are_refused_by_name(
        corpus: Path, tmp_path: Path, change: dict | Callable[[Path], None], message: str):
    run(corpus, tmp_path / "out")
    before = content(tmp_path / "out")
    changes = change if isinstance(change, dict) else {}
    if callable(change):
        change(corpus)
    with pytest.raises(UserError, match="holds a prepared set with other settings.*--overwrite"
                       ) as error:
        run(corpus, tmp_path / "out", **changes)
    assert message in str(error.value) and content(tmp_path / "out") == before
    run(corpus, tmp_path / "out", overwrite=True, **changes)
    run(corpus, tmp_path / "new", **changes)
    assert content(tmp_path / "out") == content(tmp_path / "new")


def test_other_settings_of_an_unfinished_set(corpus: Path, tmp_path: Path, fixed: str):
    interrupted(corpus, tmp_path / "out", fixed)
    with pytest.raises(UserError, match="unfinished set with other settings: T is 32 there"):
        run(corpus, tmp_path / "out", T=16, tokenizer=fixed)


def test_damaged_shard_of_a_finished_set(corpus: Path, tmp_path: Path):
    shard = tmp_path / "out" / run(corpus, tmp_path / "out").splits["train"].shards[1].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=f"{shard} is damaged; --overwrite"):
        run(corpus, tmp_path / "out")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} is missing; --overwrite"):
        run(corpus, tmp_path / "out")


def test_folders_that_cannot_be_used(corpus: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=f"{out}: cannot write there"):
            run(corpus, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        run(corpus, tmp_path / "mine", overwrite=True)
    assert content(tmp_path / "mine") == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_that_fills_up(corpus: Path, tmp_path: Path, workers: int):
    out = tmp_path / "out"
    script = tmp_path / "full.py"
    # No file may grow past 150 kB: the first shard of 600 kB of text fails as on a full disk.
    script.write_text(
        "import resource, runpy, sys\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))\n"
        f"    sys.argv = sys.argv[1:]; runpy.run_path({str(tmp_path / 'script.py')!r}, "
        "run_name='__main__')\n")
    for n in range(3):
        rows = (json.dumps({"text": text}) + "\n" for text in make_texts(2000, n))
        (corpus / f"{n}.jsonl").write_text("".join(rows))
    (tmp_path / "script.py").write_text(PREPARE)
    arguments = {"sources": [str(corpus)], "out": str(out), "tokenizer": "train:300", "T": T,
                 "validation_percent": 0.5, "licence": "CC0", "workers": workers,
                 "part_bytes": 600_000, "progress": False}
    done = subprocess.run([sys.executable, str(script), "script.py", json.dumps(arguments)],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=False)
    assert f"UserError: {out}: cannot write part 0 (about " in done.stderr, done.stderr
    assert "File too large" in done.stderr and "KiB are free" in done.stderr
    assert not list(out.glob("train-*")) and not (out / "manifest.json").exists()
    arguments["workers"] = 1
    prepare(arguments.pop("sources"), arguments.pop("out"), **arguments)
    assert not (out / "prepare.parts").exists() and Manifest.load(out).splits["train"].records


def test_worker_that_dies(corpus: Path, tmp_path: Path):
    for n in range(3):
        rows = (json.dumps({"text": text}) + "\n" for text in make_texts(4000, n))
        (corpus / f"{n}.jsonl").write_text("".join(rows))
    out = tmp_path / "out"
    process = start(tmp_path, corpus, out, part_bytes=100_000)
    deadline = time.monotonic() + 60
    while not list(out.glob("prepare.parts/0*.json")) and time.monotonic() < deadline:
        time.sleep(0.001)
    workers = [pid for pid in children(process.pid)
               if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "UserError" in stderr and "a worker process died" in stderr, stderr


@pytest.mark.parametrize("changes, message", [
    ({"T": 0}, "--context=0"), ({"validation_percent": 101.0}, "not in 0..100"),
    ({"workers": 0}, "--workers=0"), ({"part_bytes": 0}, "--part-bytes=0"),
    ({"validation_percent": 0.001}, "the validation split has no record: 0 of 300 documents"),
    ({"T": 100_000}, "the train split has no record: .*T=100000"),
    ({"validation_percent": 100.0}, "no training document to train a tokenizer on"),
    ({"licence": {"0.jsonl": "MIT"}}, "1.jsonl: its licence is not stated"),
    ({"licence": {"*": "MIT", "x.jsonl": "MIT"}}, "stated for x.jsonl, which is not among"),
    ({"tokenizer": "none.json"}, "none.json: cannot read the tokenizer"),
    ({"text_key": "body"}, "0.jsonl: line 1: no 'body' among its keys"),
])
def test_arguments_that_cannot_work(
        corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        run(corpus, tmp_path / "out", **changes)
    assert not list(tmp_path.glob("out/*.json")) and not list(tmp_path.glob("out/*.arrayrecord"))


@pytest.mark.parametrize("change, message", [
    (lambda path: path.unlink(), "is no prepared set"),
    (lambda path: path.write_text(path.read_text()[:200]), "is damaged"),
    (lambda path: path.write_text("[]"), "is damaged"),
    (lambda path: path.write_text(path.read_text().replace('"T": 32', '"T": 33')), "was edited"),
    (lambda path: path.write_text(path.read_text().replace('"eod"', '"end"')), "is damaged"),
    (lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 2')),
     "has format 2, this version reads 1"),
])
def test_damaged_manifest(corpus: Path, tmp_path: Path, change: Callable[[Path], Any],
                          message: str):
    run(corpus, tmp_path / "out")
    change(tmp_path / "out" / "manifest.json")
    with pytest.raises(UserError, match=message):
        Manifest.load(tmp_path / "out")


# ---- progress


def test_progress_outside_a_terminal(corpus: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]):
    manifest = run(corpus, tmp_path / "out", progress=True)
    [line] = capsys.readouterr().err.splitlines()
    tokens = sum(split.tokens for split in manifest.splits.values())
    assert line.startswith(f"prepare: 300 documents, {tokens:,} tokens, ")
    assert line.endswith("MB/s, 100%, 0 s left")


def test_progress_on_a_terminal_redraws_one_line(corpus: Path, tmp_path: Path):
    for n in range(3):
        rows = (json.dumps({"text": text}) + "\n" for text in make_texts(2000, n))
        (corpus / f"{n}.jsonl").write_text("".join(rows))
    terminal, inside = os.openpty()
    process = start(tmp_path, corpus, tmp_path / "out", stderr=inside)
    os.close(inside)
    shown = b""
    while chunk := _read(terminal):
        shown += chunk
    os.close(terminal)
    assert process.wait() == 0
    frames = shown.decode().split("\r\x1b[K")
    assert len(frames) > 2 and frames[-1].endswith("left\r\n")
    assert all("\n" not in frame for frame in frames[:-1])
    assert "6,000 documents" in frames[-1] and " 100%, 0 s left" in frames[-1]
    shares = [int(frame.split("%")[0].split()[-1]) for frame in frames if "documents" in frame]
    assert shares == sorted(shares) and shares[0] < 50


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux reports the closed other end so
        return b""
