"""Prepared sets to global batches: batch s is a pure function of (sets, seed, s).

There is no iterator state: any process can read any row of any step, so a run resumes from its
step number alone and sees the same batches whatever the number of hosts, devices and threads.
"""

import bisect
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Bool, Int, UInt

from spectra_jax.data.manifest import Manifest
from spectra_jax.data.mixture import Interleave, proportions
from spectra_jax.data.tokenizer import Tokenizer
from spectra_jax.errors import UserError

STREAM_FORMAT = 1  # raise it when the same sets and seed would give other batches


class RecordReader:
    """The records of one split of one prepared set, by number, in stored order.

    Opening checks that every shard is there, can be read and holds the number of records the
    manifest states; `verify` reads the whole files. Safe to use from many threads.

    Raises: UserError naming the file, at opening and at reading.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, V: int):
        self.folder, self.V, self.T = folder, V, manifest.T
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        if split not in manifest.splits or manifest.splits[split].records == 0:
            raise UserError(
                f"{folder}: the split {split!r} holds no records of {self.T} tokens; splits here: "
                f"{ {name: s.records for name, s in manifest.splits.items()} }. Prepare more text, "
                "a shorter context, or a larger share for this split"
            )
        self.shards = tuple(shard for shard in manifest.splits[split].shards if shard.records)
        self.sources = [self._open(shard.file, shard.records) for shard in self.shards]
        self.ends = list(itertools.accumulate(shard.records for shard in self.shards))

    def _open(self, name: str, records: int) -> grain.sources.ArrayRecordDataSource:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: the manifest names it with {records} records; "
                            "copy it again or prepare the set again")
        try:
            source = grain.sources.ArrayRecordDataSource([str(path)])
        except RuntimeError as error:  # array_record's only exception type
            raise UserError(f"{path} ({path.stat().st_size} bytes) is truncated or no ArrayRecord "
                            f"file: {error}; copy it again or prepare the set again") from error
        if len(source) != records:
            raise UserError(f"{path} holds {len(source)} records, the manifest states {records}; "
                            "copy the shard and manifest.json again or prepare the set again")
        return source

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> UInt[np.ndarray, " T1"]:
        """T + 1 consecutive tokens, in the stored type. `index` in [0, len)."""
        shard = bisect.bisect_right(self.ends, index)
        position = index - self.ends[shard] + self.shards[shard].records
        where = f"record {position} of {self.folder / self.shards[shard].file}"
        try:
            raw = self.sources[shard][position]
        except RuntimeError as error:
            raise UserError(f"{where} is corrupt: {error}; copy the shard again or prepare "
                            "the set again") from error
        if len(raw) != (self.T + 1) * self.dtype.itemsize:
            raise UserError(f"{where} has {len(raw)} bytes, T + 1 = {self.T + 1} tokens of "
                            f"{self.dtype.name} make {(self.T + 1) * self.dtype.itemsize}; "
                            "prepare the set again")
        tokens = np.frombuffer(raw, self.dtype)
        if tokens.max() >= self.V:
            raise UserError(f"{where} holds the token id {tokens.max()}, the model's vocabulary "
                            f"ends at {self.V - 1}; prepare the set again with the run's tokenizer")
        return tokens

    def verify(self) -> None:
        """Read every shard file whole and compare its sha256 with the manifest's."""
        for shard in self.shards:
            path = self.folder / shard.file
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise UserError(f"{path} has sha256 {found}, the manifest states {shard.sha256}; "
                                "copy it again or prepare the set again")


class Prefetched(Iterator):
    """make(start), ..., make(stop - 1), computed ahead by threads; same items, same order.

    An error in a thread is raised here, at the item it belongs to. `stall_seconds` is the time
    the consumer has waited so far. Use it as a context manager, or `close` it, to stop early.
    """

    def __init__(self, make: Callable[[int], Any], start: int, stop: int, threads: int, ahead: int):
        self.stall_seconds = 0.0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._items = iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))
        self._items.start_prefetch()

    def __next__(self) -> Any:
        asked = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.stall_seconds += time.perf_counter() - asked

    def close(self) -> None:
        self._items.close()

    def __enter__(self) -> "Prefetched":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


class Loader:
    """Batches of B rows of T + 1 tokens from a weighted mixture of prepared sets.

    Row i of the endless stream depends on (sets, weights, T, split, seed, i) alone, and batch s
    is rows s*B .. s*B + B - 1. Each set is shuffled anew in every epoch of its own, by a seed
    drawn from (seed, split, fingerprint of the set): adding a set to a mixture leaves the order
    of the others as it was.

    Args:
        sets: (folder, weight) of each prepared set; a weight is a share of the rows.
        split: "train" or "validation".
        T: context length in tokens. B: rows of the global batch. V: vocabulary of the model.
        seed: of the training order; `records` and `sequential` do not use it.

    Raises: UserError if the sets cannot serve such batches, or a shard is missing or damaged.
    """

    def __init__(self, sets: Sequence[tuple[Path | str, float | int]], *, split: str,
                 T: int, B: int, V: int, seed: int):
        if not sets or B < 1:
            raise UserError(f"{len(sets)} prepared sets and a batch of {B} rows; both must be at "
                            "least 1")
        self.split, self.T, self.B, self.V, self.seed = split, T, B, V, seed
        self.folders = tuple(Path(folder) for folder, _ in sets)
        self.manifests = tuple(Manifest.load(folder) for folder in self.folders)
        self.parts = proportions([weight for _, weight in sets])
        self._check_sets()
        self.readers = tuple(RecordReader(folder, manifest, split, V)
                             for folder, manifest in zip(self.folders, self.manifests))
        self._ends = list(itertools.accumulate(len(reader) for reader in self.readers))
        streams = [
            grain.MapDataset.source(reader)
            .shuffle(seed=_shuffle_seed(seed, split, manifest.fingerprint)).repeat()
            for reader, manifest in zip(self.readers, self.manifests)
        ]
        self._rows = grain.MapDataset.select_from_datasets(streams, Interleave(self.parts))

    def _check_sets(self) -> None:
        first = self.manifests[0]
        seen: dict[str, Path] = {}
        for folder, manifest in zip(self.folders, self.manifests):
            if manifest.T != self.T:
                raise UserError(f"{folder} holds records of T={manifest.T} tokens, the run asks "
                                f"for T={self.T}; prepare it again with --context={self.T} or "
                                f"set --config.data.T={manifest.T}")
            if manifest.vocab_size > self.V:
                raise UserError(f"{folder} was tokenized with a vocabulary of {manifest.vocab_size}"
                                f", the model has V={self.V}; set the model's vocabulary to at "
                                f"least {manifest.vocab_size} or prepare with another tokenizer")
            if manifest.tokenizer["sha256"] != first.tokenizer["sha256"]:
                raise UserError(
                    f"{self.folders[0]} and {folder} were made with different tokenizers ("
                    f"{first.tokenizer['spec']}, sha256 {first.tokenizer['sha256'][:12]}, and "
                    f"{manifest.tokenizer['spec']}, sha256 {manifest.tokenizer['sha256'][:12]}); "
                    "the sets of a mixture share one tokenizer: prepare one of them again")
            if manifest.fingerprint in seen:
                raise UserError(f"{seen[manifest.fingerprint]} and {folder} hold the same data; "
                                "name the set once, with the sum of the weights")
            seen[manifest.fingerprint] = folder

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UserError if the sets were made with another tokenizer than a model's."""
        used = self.manifests[0].tokenizer["sha256"]
        if used != tokenizer.sha256:
            raise UserError(f"{self.folders[0]} was tokenized with another tokenizer (sha256 {used[:12]}) than the "
                            f"model's ({tokenizer.sha256[:12]}); prepare it with --tokenizer=WORKDIR/tokenizer.json")

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the batches besides seed and B."""
        decides = {"stream": STREAM_FORMAT, "split": self.split, "T": self.T,
                   "sets": [[manifest.fingerprint, part]
                            for manifest, part in zip(self.manifests, self.parts)]}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        """Number of records of the split over all sets."""
        return self._ends[-1]

    def verify(self) -> None:
        """Compare the sha256 of every shard of the split with its manifest (reads every byte)."""
        for reader in self.readers:
            reader.verify()

    def batch_at(
        self, step: int, rows: slice | Int[np.ndarray, " R"] | None = None
    ) -> Int[np.ndarray, "B T1"]:
        """Global batch `step`, or those of its rows: int32; inputs [:, :-1], targets [:, 1:].

        Raises: UserError if a record that it needs is damaged; IndexError for rows beyond B.
        """
        if step < 0:
            raise IndexError(f"step {step} is negative")
        chosen = np.arange(self.B)[slice(None) if rows is None else rows]
        return self._stack([self._rows[step * self.B + int(row)] for row in chosen])

    def records(self, start: int, stop: int) -> Int[np.ndarray, "R T1"]:
        """Records start .. stop - 1 in stored order, set after set, whatever seed and weights."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"records {start}..{stop} of {len(self)}")
        return self._stack([self._record(index) for index in range(start, stop)])

    def _record(self, index: int) -> UInt[np.ndarray, " T1"]:
        k = bisect.bisect_right(self._ends, index)
        return self.readers[k][index - self._ends[k] + len(self.readers[k])]

    def _stack(self, rows: list[np.ndarray]) -> Int[np.ndarray, "R T1"]:
        return np.array(rows, np.int32).reshape(len(rows), self.T + 1)

    def batches(self, start: int, stop: int, sharding: NamedSharding | None = None, *,
                threads: int = 2, ahead: int = 8) -> Prefetched:
        """The batches of steps start .. stop - 1, read ahead by `threads` threads.

        With `sharding` (of the [B, T + 1] batch) each item is a global jax.Array that is already
        on its devices, and this process reads only the rows its own devices hold; otherwise it
        is what `batch_at` gives.
        """
        if sharding is None:
            return Prefetched(self.batch_at, start, stop, threads, ahead)
        mine = local_rows(sharding, self.B, self.T + 1)
        return Prefetched(
            lambda step: _to_devices(self.batch_at(step, mine), mine, self.B, sharding),
            start, stop, threads, ahead)

    def sequential(self, B: int | None = None, sharding: NamedSharding | None = None, *,
                   limit: int | None = None, threads: int = 2, ahead: int = 8) -> Prefetched:
        """Every record once (the first `limit` of them), in stored order, for evaluation.

        Items are (batch [B, T + 1] as in `batches`, mask [B]): rows that fill up the last batch
        are zeros, and False in the mask, a numpy array that is the same on every process.
        """
        B, total = B or self.B, len(self) if limit is None else min(limit, len(self))
        mine = np.arange(B) if sharding is None else local_rows(sharding, B, self.T + 1)

        def make(step: int) -> tuple[Int[np.ndarray | jax.Array, "B T1"], Bool[np.ndarray, " B"]]:
            mask = step * B + np.arange(B) < total
            batch = np.zeros((len(mine), self.T + 1), np.int32)
            for row in np.flatnonzero(mask[mine]):
                batch[row] = self._record(step * B + int(mine[row]))
            return batch if sharding is None else _to_devices(batch, mine, B, sharding), mask

        return Prefetched(make, 0, -(-total // B), threads, ahead)


def _shuffle_seed(seed: int, split: str, fingerprint: str) -> int:
    # grain shuffles epoch e by (seed + e) mod 2**32, so the run's seed must not be used as it
    # is: seed 1 would begin with the second epoch of seed 0.
    digest = hashlib.sha256(f"{seed}/{split}/{fingerprint}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def local_rows(sharding: NamedSharding, B: int, T1: int) -> Int[np.ndarray, " R"]:
    """Rows of the [B, T1] batch that the devices of this process hold, ascending.

    Raises: UserError if B does not split evenly over the mesh.
    """
    try:
        indices = sharding.addressable_devices_indices_map((B, T1)).values()
    except ValueError as error:
        raise UserError(f"a global batch of {B} rows does not split evenly by {sharding.spec} over "
                        f"the mesh {dict(sharding.mesh.shape)}; use a multiple of the product of "
                        "those axes, or change --config.mesh") from error
    return np.unique(np.concatenate([np.arange(B)[rows] for rows, *_ in indices]))


def _to_devices(part: Int[np.ndarray, "R T1"], rows: Int[np.ndarray, " R"], B: int,
                sharding: NamedSharding) -> Int[jax.Array, "B T1"]:
    batch = np.empty((B, part.shape[1]), part.dtype)  # the rows of others stay unwritten
    batch[rows] = part
    return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])
