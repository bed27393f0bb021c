"""Prepared sets: what the records hold, that nothing but the arguments decides them, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from array_record.python.array_record_module import ArrayRecordReader

from spectra_jax.data import tokenizer as tokenizers_module
from spectra_jax.data.manifest import Manifest as ManifestOfItsModule
from spectra_jax.data.parts import is_validation
from spectra_jax.data.prepare import Manifest, prepare
from spectra_jax.errors import UserError

ROOT = Path(__file__).parents[2]
T = 32


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["the", "whale", "said", "naïve", "1729", "😀", "of", "ocean\n", "(and)", "café"]
    return [f"{seed}.{n} " + " ".join(rng.choice(words, rng.integers(5, 120)))
            for n in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three sources of 100 documents each, about 110 KB."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(3):
        rows = (json.dumps({"text": text}) + "\n" for text in make_texts(100, n))
        (folder / f"{n}.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def fixed(tmp_path: Path) -> str:
    """A tokenizer file: with it parts are made before the last source is read."""
    tokenizers_module.train(make_texts(50), 300).save(tmp_path / "fixed.json")
    return str(tmp_path / "fixed.json")


def run(corpus: Path, out: Path, **changes: Any) -> Manifest:
    options = {"tokenizer": "train:400", "T": T, "validation_percent": 10.0, "licence": "CC0",
               "workers": 1, "part_bytes": 10_000, "progress": False}
    return prepare([corpus], out, **options | changes)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("whale", "shark"))


def records(manifest: Manifest, split: str) -> list[list[np.ndarray]]:
    """The records of each shard, read with array_record itself."""
    result = []
    for shard in manifest.splits[split].shards:
        raw = ArrayRecordReader(str(manifest.folder / shard.file)).read_all()
        assert len(raw) == shard.records
        result.append([np.frombuffer(record, "<u2") for record in raw])
    return result


# ---- what a set holds


def test_records_hold_the_documents_in_order(corpus: Path, tmp_path: Path):
    manifest = run(corpus, tmp_path / "out")
    oracle = tokenizers.Tokenizer.from_file(str(manifest.tokenizer_file))
    streams: dict[str, list[int]] = {"train": [], "validation": []}
    predicted = covered = 0
    for split in streams:
        for shard in records(manifest, split):
            assert all(record.shape == (T + 1,) for record in shard)
            for a, b in zip(shard, shard[1:]):
                assert a[-1] == b[0], "neighbours share one token"
            stream = [int(shard[0][0])] + [int(t) for record in shard for t in record[1:]]
            assert stream[0] == manifest.eod
            streams[split].append(stream)
            predicted += len(stream) - 1
    texts = [text for n in range(3) for text in make_texts(100, n)]
    pieces: list[str] = []
    for split, parts in streams.items():
        found = [text for part in parts for text in
                 oracle.decode(part, skip_special_tokens=False).split("<|endoftext|>") if text]
        positions = []
        for piece in found:  # the last of a part may be cut off
            [position] = [n for n, text in enumerate(texts) if text.startswith(piece.rstrip("�"))]
            positions.append(position)
        assert positions == sorted(set(positions)), "in the order of the sources, each once"
        covered = sum(len(piece.rstrip("�").encode()) for piece in found)
        assert covered <= manifest.splits[split].bytes <= covered + 3 * len(parts)
        pieces += found
    whole = [oracle.encode(text).ids for text in texts]
    assert predicted + manifest.dropped_tokens == sum(len(ids) + 1 for ids in whole)
    assert manifest.dropped_tokens < T * sum(
        len(split.shards) for split in manifest.splits.values())
    assert sum(split.documents for split in manifest.splits.values()) == 300
    assert predicted == sum(split.tokens for split in manifest.splits.values())
    assert 5 <= manifest.splits["validation"].documents <= 60


def test_manifest_states_what_is_there(corpus: Path, tmp_path: Path):
    made = run(corpus, tmp_path / "out", licence={"1.jsonl": "MIT", "*": "CC0"})
    assert Manifest is ManifestOfItsModule
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == made
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {"format", "T", "dtype", "vocab_size", "eod", "tokenizer", "sources", "splits",
            "dropped_tokens", "fingerprint"} <= stored.keys()
    assert stored["fingerprint"] == manifest.fingerprint and stored["format"] == 1
    assert [(s["path"], s["documents"], s["licence"]) for s in manifest.sources] == [
        ("0.jsonl", 100, "CC0"), ("1.jsonl", 100, "MIT"), ("2.jsonl", 100, "CC0")]
    for source in manifest.sources:
        path = corpus / source["path"]
        said = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert said.stdout.split()[0] == source["sha256"]
        assert path.stat().st_size == source["bytes"]
    tokenizer = tokenizers_module.load(str(manifest.tokenizer_file))
    assert tokenizer.sha256 == manifest.tokenizer["sha256"]
    assert (manifest.dtype, manifest.vocab_size, manifest.eod) == (
        "uint16", tokenizer.vocab_size, tokenizer.eod)
    names = {"manifest.json", "tokenizer.json"} | {
        shard.file for split in manifest.splits.values() for shard in split.shards}
    assert set(content(tmp_path / "out")) == names
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_split_goes_by_content_alone(tmp_path: Path):
    def validation(texts: list[str], name: str, **changes: Any) -> set[str]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
        manifest = run(folder, tmp_path / f"{name}.out", T=1, **changes)
        oracle = tokenizers.Tokenizer.from_file(str(manifest.tokenizer_file))
        stream = [int(record[1]) for shard in records(manifest, "validation") for record in shard]
        return set(oracle.decode(stream, skip_special_tokens=False).split("<|endoftext|>")) - {""}

    texts = [text.replace("\n", "") for text in make_texts(200)]
    held_out = validation(texts, "a")
    assert held_out == validation(texts[::-1], "b", part_bytes=2000, tokenizer="train:300")
    assert held_out == validation(texts + texts[:50], "c"), "copies stay on one side"
    assert held_out < validation(texts, "d", validation_percent=30.0), "a larger share adds"


def test_one_sided_splits(corpus: Path, tmp_path: Path):
    none = run(corpus, tmp_path / "a", validation_percent=0)
    assert none.splits["validation"].shards == () and none.splits["train"].documents == 300
    path = str(none.tokenizer_file)
    all_of_it = run(corpus, tmp_path / "b", validation_percent=100, tokenizer=path)
    assert all_of_it.splits["train"].records == 0
    assert all_of_it.splits["validation"].documents == 300
    assert all_of_it.tokenizer["spec"] == "tokenizer.json"


def test_large_vocabularies_take_four_bytes(tmp_path: Path, corpus: Path):
    model = tokenizers.models.WordLevel({f"w{n}": n for n in range(70_000)}, unk_token="w69999")
    big = tokenizers.Tokenizer(model)
    big.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    big.add_special_tokens(["stop"])
    big.save(str(tmp_path / "big.json"))
    manifest = run(corpus, tmp_path / "out", tokenizer=str(tmp_path / "big.json"), eod="stop")
    assert (manifest.dtype, manifest.vocab_size, manifest.eod) == ("uint32", 70_001, 70_000)
    shard = manifest.splits["train"].shards[0]
    first = ArrayRecordReader(str(tmp_path / "out" / shard.file)).read_all()[0]
    assert set(np.frombuffer(first, "<u4").tolist()) == {69_999, 70_000}


def test_tokenizer_training_is_capped_and_sees_no_validation_text(tmp_path: Path):
    # Each document has a word of its own, often enough in it to become a token.
    texts = [" ".join([f"{chr(0x4E00 + n)}{chr(0x5E00 + n)}"] * 50) for n in range(300)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts))

    def known(name: str, **changes: Any) -> set[str]:
        manifest = run(tmp_path / "a.txt", tmp_path / name, tokenizer="train:9000",
                       validation_percent=30.0, **changes)
        tokenizer = tokenizers_module.load(str(manifest.tokenizer_file))
        held_out.update(text for text in texts if is_validation(text.encode(), 30.0))
        return {text for text, ids in zip(texts, tokenizer.encode_batch(texts)) if len(ids) <= 50}

    held_out: set[str] = set()
    assert known("all") == set(texts) - held_out and 50 < len(held_out) < 130
    few = known("few", train_bytes=20_000)  # of 105 kB
    assert few < set(texts) - held_out and 20 < len(few) < 60
    assert len({texts.index(text) // 100 for text in few}) == 3, "spread over the stream"


# ---- nothing but the arguments decides


def test_workers_do_not_matter(corpus: Path, tmp_path: Path):
    run(corpus, tmp_path / "one", workers=1)
    run(corpus, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


PREPARE = """
import json, sys
from spectra_jax.data.prepare import prepare
if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    prepare(arguments.pop("sources"), arguments.pop("out"), **arguments)
"""


def start(tmp_path: Path, corpus: Path, out: Path, stderr: int = subprocess.PIPE,
          **changes: Any) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(PREPARE)
    arguments = {"sources": [str(corpus)], "out": str(out), "tokenizer": "train:400", "T": T,
                 "validation_percent": 10.0, "licence": "CC0", "workers": 2, "part_bytes": 10_000}
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(arguments | changes)], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=stderr, text=True,
        start_new_session=True)


def children(process: int) -> list[int]:
    return [int(pid) for pid in
            Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed(corpus: Path, tmp_path: Path, workers: int):
    # Enough text for the kill to fall among the parts.
    for n in range(3):
        rows = (json.dumps({"text": text}) + "\n" for text in make_texts(2000, n))
        (corpus / f"{n}.jsonl").write_text("".join(rows))
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(corpus, whole, part_bytes=50_000)
    process = start(tmp_path, corpus, out, workers=workers, part_bytes=50_000)
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("prepare.parts/*.json"))) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        alive = children(process.pid)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "manifest.json").exists()
    while any(Path(f"/proc/{pid}").exists() for pid in alive) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in alive), "workers outlive the parent"
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("prepare.parts/0*.json")}
    shards = {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrayrecord")}
    assert kept and len(shards) < len(list(whole.glob("*.arrayrecord")))
    run(corpus, out, workers=workers, part_bytes=50_000)
    assert content(out) == content(whole)
    for name in kept:
        shard = f"train-{Path(name).stem}.arrayrecord"
        assert (out / shard).stat().st_mtime_ns == shards[shard], "a finished part stays"


def interrupted(corpus: Path, out: Path, tokenizer: str) -> None:
    """Leave `out` as a run leaves it that meets a broken line in the last source."""
    last = corpus / "2.jsonl"
    good = last.read_text()
    last.write_text(good + "{broken\n")
    with pytest.raises(UserError, match="2.jsonl: line 101: not JSON"):
        run(corpus, out, tokenizer=tokenizer)
    last.write_text(good)
    assert not (out / "manifest.json").exists() and list(out.glob("train-*"))


def test_repaired_source_or_damaged_part_is_made_again(corpus: Path, tmp_path: Path, fixed: str):
    run(corpus, tmp_path / "whole", tokenizer=fixed)
    interrupted(corpus, tmp_path / "out", fixed)
    (tmp_path / "out" / "train-00000.arrayrecord").write_bytes(b"damaged")
    second = (tmp_path / "out" / "train-00001.arrayrecord").stat().st_mtime_ns
    run(corpus, tmp_path / "out", tokenizer=fixed)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert (tmp_path / "out" / "train-00001.arrayrecord").stat().st_mtime_ns == second


def test_shorter_source_leaves_no_shard_behind(corpus: Path, tmp_path: Path, fixed: str):
    interrupted(corpus, tmp_path / "out", fixed)
    (corpus / "2.jsonl").write_text(json.dumps({"text": "short"}) + "\n")
    run(corpus, tmp_path / "out", tokenizer=fixed)
    run(corpus, tmp_path / "whole", tokenizer=fixed)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_trained_tokenizer_is_kept_only_for_the_same_text(corpus: Path, tmp_path: Path):
    out, scratch = tmp_path / "out", tmp_path / "out" / "prepare.parts"
    run(corpus, tmp_path / "whole")
    run(corpus, out)  # put the clock back to the moment before the manifest was written
    settings = json.loads((out / "manifest.json").read_text())
    scratch.mkdir()
    (out / "tokenizer.json").rename(scratch / "tokenizer.json")
    (scratch / "settings.json").write_text(json.dumps(settings["settings"] | {
        "T": T, "sources": [{key: value for key, value in source.items() if key != "documents"}
                            for source in settings["sources"]]}))
    (out / "manifest.json").unlink()
    kept = (scratch / "tokenizer.json").read_bytes()
    edit(corpus / "1.jsonl")
    run(corpus, out)
    run(corpus, tmp_path / "new")
    assert content(out) == content(tmp_path / "new") != content(tmp_path / "whole")
    assert kept == content(tmp_path / "whole")["tokenizer.json"] != content(out)["tokenizer.json"]


def test_finished_set_is_returned_at_once(corpus: Path, tmp_path: Path):
    first = run(corpus, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(corpus, tmp_path / "out", workers=2) == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


# ---- bad input


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
