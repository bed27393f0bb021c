"""Every stored form gives the same documents, and every kind of damage one clear message."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from spectra_jax.data.sources import documents, expand, fingerprint
from spectra_jax.errors import UserError

TEXTS = [f"Document {n}.\n\nIt says “naïve café 😀” {n * n} times.\n" + "word " * (n % 700)
         for n in range(1500)]
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress,
        ".zst": lambda data: zstandard.compress(data, 3)}


def as_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, key: text}, ensure_ascii=n % 2 == 0) + "\n"
                   for n, text in enumerate(texts)).encode()


def as_text(texts: list[str], end: str = "\n") -> bytes:
    return "".join(text + f"{end}<|endoftext|>{end}" for text in texts).encode()


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def write_arrow(path: Path, texts: list[str], rows: int = 100) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"n": range(len(texts)), "text": texts})
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)
    return str(path)


def failure(path: str, **options: str) -> str:
    with pytest.raises(UserError) as error:
        list(documents(path, **options))
    message = str(error.value)
    assert message.startswith(path), message
    return message


# ---- what can be read


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("form", [".txt", ".jsonl", ".json"])
def test_text_and_lines(tmp_path: Path, form: str, suffix: str):
    content = as_text(TEXTS) if form == ".txt" else as_lines(TEXTS)
    path = write(tmp_path / f"a{form}{suffix}", PACK[suffix](content))
    shares: list[float] = []
    assert list(documents(path, on_fraction=shares.append)) == TEXTS
    assert shares == sorted(shares) and shares[-1] == 1.0


def test_compressed_files_of_several_members(tmp_path: Path):
    content = as_lines(TEXTS)
    for suffix in (".gz", ".xz", ".zst"):
        halves = PACK[suffix](content[:70000]) + PACK[suffix](content[70000:])
        path = write(tmp_path / f"two.jsonl{suffix}", halves)
        assert list(documents(path)) == TEXTS
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"  # of the zstd format
    assert list(documents(write(tmp_path / "s.jsonl.zst", halves + skippable))) == TEXTS


def test_text_without_separator_is_one_exact_document(tmp_path: Path):
    text = "One.\r\n\r\nTwo <|endoftext|> in a line.\n"
    assert list(documents(write(tmp_path / "a.txt", text.encode()))) == [text]


def test_separators(tmp_path: Path):
    content = as_text(["a", "b\nb", " \n", "c"], "\r\n") + b"last"
    assert list(documents(write(tmp_path / "a.txt", content))) == ["a", "b\nb", "c", "last"]
    own = write(tmp_path / "b.txt", b"\xef\xbb\xbfone\n%%\n%%\ntwo\n")
    assert list(documents(own, separator="%%")) == ["one", "two"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_parquet_by_row_groups(tmp_path: Path, kind: pyarrow.DataType):
    table = pyarrow.table({"n": range(len(TEXTS)), "body": pyarrow.array(TEXTS, kind)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=400)
    assert list(documents(tmp_path / "a.parquet", text_key="body")) == TEXTS


def test_saved_hugging_face_data_set(tmp_path: Path):
    names = [f"data-0000{n}-of-00002.arrow" for n in (1, 0)]  # in the order of state.json
    write_arrow(tmp_path / "set" / names[0], TEXTS[:900])
    write_arrow(tmp_path / "set" / names[1], TEXTS[900:])
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    write(tmp_path / "set" / "state.json", json.dumps(state).encode())
    write(tmp_path / "set" / "dataset_info.json", b"{}")
    files = expand([tmp_path / "set"])
    assert [Path(path).name for path in files] == names
    assert [text for path in files for text in documents(path)] == TEXTS


def test_hub_snapshot(tmp_path: Path):
    blob = write(tmp_path / "blobs" / "0f3a", as_lines(TEXTS[:5]))
    snapshot = tmp_path / "snapshots" / "main"
    write(snapshot / "README.md", b"# data")
    write(snapshot / "dataset_infos.json", b"{}")
    write(snapshot / ".cache" / "x.jsonl", b"junk")
    write(snapshot / "data" / "train-00001.jsonl", as_lines(TEXTS[5:7]))
    os.symlink(blob, snapshot / "data" / "train-00000.jsonl")
    files = expand([str(snapshot)])
    assert [text for path in files for text in documents(path)] == TEXTS[:7]


MAKE_TFDS = """
import sys
import tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager):
        return {"train": self._generate_examples(40, "train"),
                "test": self._generate_examples(3, "test")}
    def _generate_examples(self, count, name):
        for n in range(count):
            yield n, {"text": f"{name} {n} é"}
Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
READ_TFDS = """
import json, sys
from spectra_jax.data.sources import documents, expand, fingerprint
from spectra_jax.errors import UserError
result = {}
for name in sys.argv[1:]:
    try:
        [source] = expand([name])
        result[name] = [list(documents(source)), fingerprint(source)]
    except UserError as error:
        result[name] = str(error)
result["tensorflow"] = "tensorflow" in sys.modules
print(json.dumps(result))
"""


def test_tfds_without_tensorflow(tmp_path: Path):
    def python(code: str, *arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, *arguments], text=True,
                              env=os.environ | {"TFDS_DATA_DIR": str(tmp_path)},
                              capture_output=True, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python(MAKE_TFDS, str(tmp_path))
    names = ["tfds:tiny", "tfds:tiny:test", "tfds:tiny:1.0.0:train[:25%]", "tfds:nonesuch",
             "tfds:tiny:trian"]
    read = json.loads(python(READ_TFDS, *names))
    assert not read["tensorflow"]
    whole, test, quarter = (read[name][0] for name in names[:3])
    assert sorted(whole) == sorted(f"train {n} é" for n in range(40))
    assert sorted(test) == [f"test {n} é" for n in range(3)] and quarter == whole[:10]
    assert len({read[name][1][0] for name in names[:3]}) == 3, "another split is another source"
    assert "Dataset nonesuch not found" in read["tfds:nonesuch"]
    assert "Unknown split 'trian'. Should be one of" in read["tfds:tiny:trian"]


def test_tfds_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install 'tensorflow-datasets" in failure("tfds:lm1b:train")


# ---- expand and fingerprint


def test_expand_is_sorted_and_keeps_the_order_of_the_arguments(tmp_path: Path):
    for name in ("b.txt", "a.txt", "c/a.jsonl.gz", "d[1].txt"):
        write(tmp_path / name, b"x")
    found = expand([tmp_path / "d[1].txt", f"{tmp_path}/[ab].txt", tmp_path / "c", "tfds:lm1b"])
    assert found == [str(tmp_path / name) for name in ("d[1].txt", "a.txt", "b.txt",
                                                       "c/a.jsonl.gz")] + ["tfds:lm1b"]


def test_expand_refuses(tmp_path: Path):
    for name in ("mix/a.txt", "mix/b.jsonl", "splits/train-0.txt", "splits/test-0.txt",
                 "odd/a.docx", "odd/b.parquet.gz", "gone/state.json", "view/state.json",
                 "both/train/state.json", "both/dataset_dict.json", "bad/state.json"):
        write(tmp_path / name, b"{}")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "gone/state.json", b'{"_data_files": [{"filename": "a.arrow"}]}')
    write(tmp_path / "view/state.json",
          b'{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}')
    for source, message in {
        "none.txt": "no such file, folder or match", "*.txt": "no such file, folder or match",
        "empty": "no .txt, .jsonl", "mix": r"mixes file types \({'lines': 1, 'text': 1} files\)",
        "splits": r"mixes splits \({'test': 1, 'train': 1} files\)",
        "odd/a.docx": "unknown file type", "odd/b.parquet.gz": "unknown file type",
        "gone": "a.arrow is missing", "view": "flatten_indices", "bad": "not the state",
        "both": "holds the splits train",
    }.items():
        with pytest.raises(UserError, match=message):
            expand([tmp_path / source])
    for sources, message in (([], "no sources"), (["tfds:"], "tfds:NAME"),
                             ([tmp_path / "mix/*.txt", tmp_path / "mix/../mix/a.txt"], "twice")):
        with pytest.raises(UserError, match=message):
            expand(sources)


def test_fingerprint_is_of_the_bytes(tmp_path: Path):
    a, b = write(tmp_path / "a.txt", b"same"), write(tmp_path / "b.txt", b"same")
    c = write(tmp_path / "c.txt", b"sane")
    assert fingerprint(a) == fingerprint(b) != fingerprint(c) and fingerprint(a)[1] == 4
    with pytest.raises(UserError, match="is empty"):
        fingerprint(write(tmp_path / "d.txt", b""))


# ---- bad input


def test_missing_file(tmp_path: Path):
    assert "no such file" in failure(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("name, content", [
    ("a.txt", b""), ("a.parquet", b""), ("b.txt", b" \n\n"), ("c.jsonl", b"\n\n"),
    ("d.jsonl", b'{"text": ""}\n'), ("e.txt.gz", gzip.compress(b"", mtime=0)),
    ("f.jsonl.zst", zstandard.compress(b"")), ("g.txt", b"<|endoftext|>\n" * 3)])
def test_empty_file(tmp_path: Path, name: str, content: bytes):
    assert "remove it from the sources" in failure(write(tmp_path / name, content))


@pytest.mark.parametrize("suffix", PACK)
def test_not_utf8(tmp_path: Path, suffix: str):
    content = "Zeile eins\nänderte\n".encode() + "größer\n".encode("latin1")
    message = failure(write(tmp_path / f"a.txt{suffix}", PACK[suffix](content)))
    assert "line 3: byte 0xF6 at offset 22 is not UTF-8" in message and "iconv" in message


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("form", [".txt", ".jsonl"])
def test_truncated_compressed_file(tmp_path: Path, form: str, suffix: str):
    whole = PACK[suffix](as_text(TEXTS) if form == ".txt" else as_lines(TEXTS))
    for size in (len(whole) - 1, len(whole) // 2, 10):
        message = failure(write(tmp_path / f"a{form}{suffix}", whole[:size]))
        assert "truncated" in message and f"({size} bytes)" in message


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_or_misnamed_compressed_file(tmp_path: Path, suffix: str):
    whole = bytearray(PACK[suffix](as_lines(TEXTS)))
    whole[len(whole) // 2] ^= 0xFF
    try:  # zstandard writes no checksum by default: then the flip may show as broken text
        list(documents(write(tmp_path / f"a.jsonl{suffix}", bytes(whole))))
    except UserError:
        pass
    else:
        pytest.fail("a flipped byte was read without a word")
    assert "is damaged" in failure(write(tmp_path / f"b.jsonl{suffix}", as_lines(TEXTS)))


@pytest.mark.parametrize("line, message", [
    ('{"text": "cut of', "not JSON: Unterminated string"),
    ("[1, 2]", "a list, not an object"), ('"text"', "a str, not an object"),
    ('{"id": 1, "body": "x"}', "no 'text' among its keys (body, id); name the one"),
    ('{"text": null}', "'text' holds a NoneType, not a string"),
    ('{"text": "\\ud800"}', "'text' has half a surrogate pair at character 0")])
def test_broken_line(tmp_path: Path, line: str, message: str):
    content = as_lines(TEXTS[:11]) + b"\n" + line.encode() + b"\n" + as_lines(TEXTS[:2])
    assert f": line 13: {message}" in failure(write(tmp_path / "a.jsonl", content))


def test_bad_parquet(tmp_path: Path):
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    whole = Path(path).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 3):
        message = failure(write(tmp_path / "b.parquet", whole[:size]))
        assert f"is damaged or truncated ({size} bytes)" in message
    assert "no 'body' among its keys (text)" in failure(path, text_key="body")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert "row 1: 'text' holds a NoneType" in failure(path)
    raw = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": raw}), path)
    assert "rows 0..1 is not UTF-8" in failure(path)


def test_bad_arrow(tmp_path: Path):
    whole = Path(write_arrow(tmp_path / "a.arrow", TEXTS)).read_bytes()
    for size in (len(whole) - 8, len(whole) // 2, 5):
        message = failure(write(tmp_path / "b.arrow", whole[:size]))
        assert "truncated" in message
    assert "no 'body' among its keys (n, text)" in failure(str(tmp_path / "a.arrow"),
                                                           text_key="body")
