"""Readers of one stored form each: text, JSON lines, Parquet, Arrow, TensorFlow Datasets.

Each yields the documents of one source as they are stored and tells `on_fraction` the share read
so far, in [0, 1]. What the libraries raise on unreadable data leaves as a UserError.
"""

import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from pyarrow import parquet

from spectra_jax.errors import UserError

CHUNK = 1 << 16  # compressed bytes taken at a time
BATCH_ROWS = 256  # rows of a table held as Python strings at a time
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # end-of-stream mark of an Arrow IPC stream

OnFraction = Callable[[float], None]


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file. zstandard's own reader ends a truncated file silently."""

    def __init__(self, raw: io.BufferedReader):
        self._raw, self._left, self._within = raw, memoryview(b""), False
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame = self._new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._within = self._new(), False
            chunk = chunk or self._raw.read(CHUNK)
            if not chunk:
                if self._within:
                    raise EOFError("the last frame has no end")
                return 0
            self._left, self._within = memoryview(self._frame.decompress(chunk)), True
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _decompressed(raw: io.BufferedReader, path: str) -> io.BufferedIOBase:
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return raw


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what the libraries raise on unreadable files into a UserError."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{path} is truncated ({os.path.getsize(path)} bytes): {error}; "
                        "copy it again") from error
    except (zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError,
            pyarrow.ArrowException) as error:
        raise UserError(f"{path} is damaged or truncated ({os.path.getsize(path)} bytes): "
                        f"{error}; copy it again") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error


def _lines(path: str, on_fraction: OnFraction) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a text file, plain or compressed."""
    offset = 0
    with reading(path), open(path, "rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        for number, line in enumerate(_decompressed(raw, path), 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number}: byte 0x{line[error.start]:02X} at offset "
                    f"{offset + error.start} is not UTF-8; convert the file, for example with "
                    "iconv -f latin1 -t utf-8") from error
            offset += len(line)
            if number % 64 == 0:
                on_fraction(raw.tell() / size)
            yield number, text.removeprefix("\ufeff") if number == 1 else text  # byte-order mark
    on_fraction(1.0)


def text_documents(path: str, separator: str, on_fraction: OnFraction) -> Iterator[str]:
    parts: list[str] = []
    separated = False
    for _, line in _lines(path, on_fraction):
        if line.rstrip("\r\n") == separator:
            separated = True
            yield _without_last_newline("".join(parts))
            parts.clear()
        else:
            parts.append(line)
    text = "".join(parts)
    yield _without_last_newline(text) if separated else text


def _without_last_newline(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")  # it belongs to the separator's line


def json_documents(path: str, text_key: str, on_fraction: OnFraction) -> Iterator[str]:
    for where, row in json_rows(path, f"an object with the key {text_key!r}", on_fraction):
        if text_key not in row:
            raise UserError(_no_key(where, text_key, row))
        yield _text(row[text_key], where, text_key)


def json_rows(
    path: str, wanted: str, on_fraction: OnFraction = lambda fraction: None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE: line N, object) of every line that is not blank; `wanted` says in errors what a line should hold."""
    for number, line in _lines(path, on_fraction):
        if line.isspace():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line.rstrip("\r\n"))
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}; each line holds one object") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__}, not {wanted}; each line holds one object")
        yield where, row


def _no_key(where: str, text_key: str, keys: Iterable[str]) -> str:
    return (f"{where}: no {text_key!r} among its keys ({', '.join(sorted(keys))}); name the one "
            "that holds the text with --text-key=KEY")


def _text(value: Any, where: str, text_key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {text_key!r} holds a {type(value).__name__}, not a string; "
                        "name another key with --text-key=KEY or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UserError(f"{where}: {text_key!r} has half a surrogate pair at character "
                        f"{error.start}, which UTF-8 cannot hold; repair the row") from error
    return value


def table_documents(path: str, kind: str, text_key: str, on_fraction: OnFraction) -> Iterator[str]:
    row = 0
    with reading(path):
        for batch, fraction in (_parquet if kind == "parquet" else _arrow)(path, text_key):
            try:
                values = batch.column(0).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: a text in rows {row}..{row + batch.num_rows - 1} is not "
                                f"UTF-8: {error}; write the file again") from error
            for value in values:
                yield _text(value, f"{path}: row {row}", text_key)
                row += 1
            on_fraction(fraction)


def _parquet(path: str, text_key: str) -> Iterator[tuple[pyarrow.RecordBatch, float]]:
    with parquet.ParquetFile(path) as file:
        if text_key not in file.schema_arrow.names:
            raise UserError(_no_key(path, text_key, file.schema_arrow.names))
        done, total = 0, max(file.metadata.num_rows, 1)
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_key]):
                done += batch.num_rows
                yield batch, done / total


def _arrow(path: str, text_key: str) -> Iterator[tuple[pyarrow.RecordBatch, float]]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - len(ARROW_END), 0))
        if file.read() != ARROW_END:  # a stream cut between two batches reads as a shorter one
            raise EOFError("the Arrow stream has no end mark")
    with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as stream:
        if text_key not in stream.schema.names:
            raise UserError(_no_key(path, text_key, stream.schema.names))
        for batch in stream:
            yield batch.select([text_key]), file.tell() / size


def tfds_parts(source: str) -> tuple[str, str]:
    """(name with version, split) of `tfds:NAME[:VERSION][:SPLIT]`; the split is train if none."""
    match = re.fullmatch(r"tfds:([^:]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(.+))?", source)
    if not match:
        raise UserError(f"{source}: write tfds:NAME or tfds:NAME:SPLIT, for example "
                        "tfds:lm1b:train or tfds:wikipedia/20230601.en:train[:10%]")
    return match[1], match[2] or "train"


@contextmanager
def _tfds(source: str) -> Iterator[Any]:
    """The tensorflow_datasets module (it needs no TensorFlow), its errors as a UserError."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"{source}: TensorFlow Datasets is missing ({error}); "
                        "pip install 'tensorflow-datasets>=4.9.10' importlib_resources") from error
    try:
        yield tensorflow_datasets
    except (OSError, ValueError, AssertionError, ImportError, RuntimeError,
            NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{source}: TensorFlow Datasets cannot serve it: {reason}. It must be "
                        "prepared in the array_record format; TFDS_DATA_DIR names the folder that "
                        "holds prepared data sets") from error


def tfds_files(source: str) -> list[str]:
    """The files that hold the split, downloaded and prepared if they are not there yet."""
    name, split = tfds_parts(source)
    with _tfds(source) as tfds:
        tfds.data_source(name, split=split)
        info = tfds.builder(name, file_format="array_record").info
        return sorted(str(path) for path in info.splits[split].filepaths)


def tfds_documents(source: str, text_key: str, on_fraction: OnFraction) -> Iterator[str]:
    name, split = tfds_parts(source)
    with _tfds(source) as tfds:
        rows = tfds.data_source(name, split=split)
        for index in range(len(rows)):
            row, where = rows[index], f"{source}: example {index}"
            if not isinstance(row, dict) or text_key not in row:
                raise UserError(_no_key(where, text_key, row if isinstance(row, dict) else ()))
            value = row[text_key]
            if isinstance(value, bytes):
                try:
                    value = value.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: byte {error.start} is not UTF-8") from error
            yield _text(value, where, text_key)
            on_fraction((index + 1) / len(rows))
