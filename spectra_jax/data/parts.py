"""Parts: runs of consecutive documents, each turned into its own shards by one process."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int32

from spectra_jax.data.formats import OnFraction
from spectra_jax.data.manifest import TOKENIZER_FILE, write_text
from spectra_jax.data.sources import documents
from spectra_jax.data.tokenizer import Tokenizer, load
from spectra_jax.errors import UserError

SPLITS = ("train", "validation")
SCRATCH = "prepare.parts"  # sub-folder of what is not final yet
# One record per chunk: random access reads no neighbour, and the file's bytes depend on the
# records alone.
WRITER_OPTIONS = "group_size:1"
PIECE = 1 << 16  # characters that enter or stay out of tokenizer training together


@dataclass(frozen=True)
class Job:
    """What every part of one set has in common. `key` identifies it (settings and tokenizer)."""
    folder: Path
    key: str
    T: int
    dtype: str
    eod: str | None
    validation_percent: float

    @property
    def scratch(self) -> Path:
        return self.folder / SCRATCH

    def shard(self, split: str, index: int) -> str:
        return f"{split}-{index:05d}.arrayrecord"

    def record(self, index: int) -> Path:
        return self.scratch / f"{index:05d}.json"


@dataclass(frozen=True)
class Part:
    """Consecutive documents. `key` hashes their text, `fraction` is the share of the sources
    read by their end."""
    index: int
    texts: Sequence[str]
    key: str
    fraction: float


def is_validation(text: bytes, percent: float) -> bool:
    """Whether a document (UTF-8) belongs to the validation split: by its content alone, so
    copies of one document never lie on both sides, and neither seed nor order matters."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < percent / 100 * 2**64


class Stream:
    """The documents of all sources in order. `counts` holds the documents of each source."""

    def __init__(self, paths: Sequence[str], settings: Mapping[str, Any]):
        self._paths, self._settings = paths, settings
        self._sizes = [source["bytes"] for source in settings["sources"]]
        self.counts = [0] * len(paths)
        self.fraction = 0.0

    def _read(self, number: int, fraction: float) -> None:
        self.fraction = (sum(self._sizes[:number]) + fraction * self._sizes[number]) / sum(self._sizes)

    def texts(self) -> Iterator[str]:
        for number, path in enumerate(self._paths):
            self.counts[number] = 0
            read = partial(self._read, number)
            read(0.0)
            for text in documents(path, text_key=self._settings["text_key"],
                                  separator=self._settings["separator"], on_fraction=read):
                self.counts[number] += 1
                yield text

    def parts(self) -> Iterator[Part]:
        index, texts, size, digest = 0, [], 0, hashlib.blake2b(digest_size=16)
        for text in self.texts():
            encoded = text.encode()
            texts.append(text)
            size += len(encoded)
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
            if size >= self._settings["part_bytes"]:
                yield Part(index, texts, digest.hexdigest(), self.fraction)
                index, texts, size = index + 1, [], 0
                digest = hashlib.blake2b(digest_size=16)
        if texts:
            yield Part(index, texts, digest.hexdigest(), 1.0)

    def sample(self, train_bytes: int, on_fraction: OnFraction) -> list[str]:
        """At most `train_bytes` of text, spread evenly over the stream: pieces are picked by the
        hash of their number. The tokenizer never sees a validation document."""
        kept: list[tuple[int, str]] = []
        number, size, threshold = 0, 0, 1 << 64
        for text in self.texts():
            if is_validation(text.encode(), self._settings["validation_percent"]):
                continue
            for start in range(0, len(text), PIECE):
                digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
                number += 1
                if int.from_bytes(digest) < threshold:
                    kept.append((int.from_bytes(digest), text[start:start + PIECE]))
                    size += len(kept[-1][1].encode())
            while size > train_bytes and len(kept) > 1:
                threshold //= 2
                kept = [(key, piece) for key, piece in kept if key < threshold] or kept[:1]
                size = sum(len(piece.encode()) for _, piece in kept)
            on_fraction(self.fraction)
        if not kept:
            raise UserError("no training document to train a tokenizer on: all are validation; "
                            "lower --validation-percent or name a tokenizer.json")
        return [piece for _, piece in kept]


def finished(job: Job, part: Part) -> Mapping[str, Any] | None:
    """The counts of a part that an earlier run of the same job made and that still stands."""
    try:
        result = json.loads(job.record(part.index).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if (result["job"], result["part"]) != (job.key, part.key):
        return None
    for split in result["splits"].values():
        if split["records"] and file_sha256(job.folder / split["file"]) != split["sha256"]:
            return None
    return result


def file_sha256(path: Path) -> str | None:
    """Hash of a file, None if there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


class PartWriter:
    """Makes the shards of parts, in whichever process it lives."""

    def __init__(self, job: Job):
        self.job = job
        self.tokenizer: Tokenizer = load(str(job.scratch / TOKENIZER_FILE), eod=job.eod)

    def __call__(self, part: Part) -> Mapping[str, Any]:
        """Write the shards and the record of `part`; returns the record."""
        job = self.job
        texts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for text in part.texts:
            texts[SPLITS[is_validation(text.encode(), job.validation_percent)]].append(text)
        result: dict[str, Any] = {"job": job.key, "part": part.key}
        try:
            result["splits"] = {split: self._split(split, texts[split], part.index)
                                for split in SPLITS}
            write_text(job.record(part.index), json.dumps(result), job.scratch)
        except (OSError, RuntimeError) as error:  # RuntimeError is array_record's only error
            needed = len(part.texts) * 2 + sum(map(len, part.texts)) // 2
            raise UserError(
                f"{job.folder}: cannot write part {part.index} (about {needed >> 10} KiB): "
                f"{error}. {shutil.disk_usage(job.folder).free >> 10} KiB are free "
                "there; make room and run the same command again: finished parts are kept"
            ) from error
        return result

    def _split(self, split: str, texts: Sequence[str], index: int) -> dict[str, Any]:
        ids = self.tokenizer.encode_batch(texts)
        tokens = self._joined(ids)
        T, records = self.job.T, max(len(tokens) - 1, 0) // self.job.T
        counts = {"documents": len(texts), "records": records, "tokens": records * T,
                  "bytes": self._covered_bytes(texts, ids, records * T + 1),
                  "dropped_tokens": max(len(tokens) - 1, 0) - records * T}
        if not records:
            return counts
        name = self.job.shard(split, index)
        partial = self.job.scratch / f"{name}.{os.getpid()}"
        try:
            self._write(partial, tokens, records)
            counts |= {"file": name, "sha256": file_sha256(partial)}
            os.replace(partial, self.job.folder / name)
        finally:
            partial.unlink(missing_ok=True)
        return counts

    def _joined(self, ids: Sequence[Int32[np.ndarray, "_"]]) -> Int32[np.ndarray, "_"]:
        """[eod] document [eod] document ... [eod]: so a document's first token is predicted too,
        from the end of the one before, also in the first document of a part."""
        if not ids:
            return np.zeros(0, np.int32)
        eod = np.array([self.tokenizer.eod], np.int32)
        return np.concatenate([eod, *(piece for text in ids for piece in (text, eod))])

    def _covered_bytes(self, texts: Sequence[str], ids: Sequence[Int32[np.ndarray, "_"]],
                       used: int) -> int:
        """UTF-8 bytes of the text in the first `used` tokens of the joined documents."""
        position, total = 1, 0
        for text, tokens in zip(texts, ids):
            if position >= used:
                break
            size, left = len(text.encode()), used - position
            whole = len(tokens) <= left
            total += size if whole else min(
                size, len(self.tokenizer.decode(tokens[:left]).encode()))
            position += len(tokens) + 1
        return total

    def _write(self, path: Path, tokens: Int32[np.ndarray, "_"], records: int) -> None:
        T = self.job.T
        stored = tokens.astype(np.dtype(self.job.dtype).newbyteorder("<"))
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for start in range(0, records * T, T):
            writer.write(stored[start:start + T + 1].tobytes())
        writer.close()
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def run(job: Job, parts: Iterable[Part],
        workers: int) -> Iterator[tuple[Part, Mapping[str, Any], bool]]:
    """(part, its record, whether this run made it) in order, made by `workers` processes.

    With one worker the work is done here. Raises UserError when a part cannot be written or a
    process dies.
    """
    if workers == 1:
        write = PartWriter(job)
        for part in parts:
            earlier = finished(job, part)
            yield part, earlier or write(part), earlier is None
        return
    # Spawned, because a JAX that already runs threads in this process does not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start, (job,))
    pending: deque[tuple[Part, Mapping[str, Any] | concurrent.futures.Future]] = deque()
    try:
        for part in parts:
            pending.append((part, finished(job, part) or pool.submit(_make, part)))
            while len(pending) > 2 * workers or (pending and _is_ready(pending[0][1])):
                yield _result(*pending.popleft())
        while pending:
            yield _result(*pending.popleft())
    except BrokenProcessPool as error:
        raise UserError(
            f"{job.folder}: a worker process died, most likely for want of memory; run the same "
            f"command again with fewer --workers than {workers}: finished parts are kept. (A "
            "script of your own must call prepare under `if __name__ == '__main__':`.)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _is_ready(entry: Mapping[str, Any] | concurrent.futures.Future) -> bool:
    return not isinstance(entry, concurrent.futures.Future) or entry.done()


def _result(part: Part, entry: Mapping[str, Any] | concurrent.futures.Future
            ) -> tuple[Part, Mapping[str, Any], bool]:
    fresh = isinstance(entry, concurrent.futures.Future)
    return part, entry.result() if fresh else entry, fresh


_writer: PartWriter | None = None  # of this worker process


def _start(job: Job) -> None:
    global _writer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _writer = PartWriter(job)


def _exit_with_parent() -> None:
    # Workers of a killed parent would wait for their next part forever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _make(part: Part) -> Mapping[str, Any]:
    return _writer(part)
