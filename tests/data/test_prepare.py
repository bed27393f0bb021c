"""Prepared sets: what the records hold, and that nothing but the arguments decides them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from array_record.python.array_record_module import ArrayRecordReader
from documents import make_texts

from spectra_jax.data import tokenizer as tokenizers_module
from spectra_jax.data.manifest import Manifest as ManifestOfItsModule
from spectra_jax.data.parts import is_validation
from spectra_jax.data.prepare import Manifest, prepare
from spectra_jax.errors import UserError

ROOT = Path(__file__).parents[2]
T = 32


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
