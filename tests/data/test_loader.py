"""Batches are a pure function of (sets, seed, step); mixtures, prefetching, devices. For any split of the work see
test_loader_properties.py; for sets that cannot be used, test_bad_sets.py.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from grain.experimental import index_shuffle
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spectra_jax.data.loader import Loader, Prefetched
from spectra_jax.data.manifest import Manifest, Shard, Split
from spectra_jax.data.mixture import Interleave, proportions
from spectra_jax.errors import UserError

T, V, B = 8, 1000, 4
GOLDEN = [4, 13, 20, 7, 2, 9, 6, 22, 1, 18, 8, 19, 14, 16, 0, 12, 11, 17, 5, 15, 3, 21, 10]
TRAIN, VALIDATION = (7, 5, 11), (3, 4)  # records per shard: 23 and 7


def write_shard(path: Path, records: list) -> Shard:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(np.asarray(record, "<u2").tobytes())
    writer.close()
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return Shard(path.name, len(records), sha)


def make_set(folder: Path, number: int = 0, *, train=TRAIN, validation=VALIDATION, vocab_size=V,
             tokenizer="a", tokens=None) -> Path:
    """Record r of the set is [number, r, r, ...]; `tokens` replaces the first train record."""
    folder.mkdir(parents=True)
    splits = {}
    for split, sizes in (("train", train), ("validation", validation)):
        shards, start = [], 0
        for i, n in enumerate(sizes):
            records = [[number] + [r] * T for r in range(start, start + n)]
            if tokens and split == "train" and i == 0:
                records[0] = tokens
            shards.append(write_shard(folder / f"{split}-{i:05d}.arrayrecord", records))
            start += n
        splits[split] = Split(tuple(shards), start, tokens=start * T, bytes=start, documents=start)
    manifest = Manifest(
        folder, T, "uint16", vocab_size, eod=0, splits=splits, sources=(), dropped_tokens=0,
        tokenizer={"spec": "own", "sha256": tokenizer * 64, "file": "tokenizer.json"}, settings={})
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("sets")
    return [make_set(root / f"set{k}", k) for k in range(3)]


def load(folders, *, weights=None, split="train", T=T, B=B, V=V, seed=0) -> Loader:
    weights = weights or [1.0] * len(folders)
    return Loader(list(zip(folders, weights)), split=split, T=T, B=B, V=V, seed=seed)


def order(loader: Loader, rows: int) -> list[int]:
    """Record numbers of the first rows of the endless stream."""
    steps = -(-rows // loader.B)
    return np.concatenate([loader.batch_at(s)[:, 1] for s in range(steps)])[:rows].tolist()


# The batch as a pure function

def test_batches_are_int32_records_whatever_was_read_before(sets):
    loader = load(sets[:1])
    late = loader.batch_at(40)
    assert late.shape == (B, T + 1) and late.dtype == np.int32
    assert np.array_equal(late[:, 1:], np.repeat(late[:, 1:2], T, axis=1))
    for step in (40, 3, 40):
        loader.batch_at(step)
    assert np.array_equal(load(sets[:1]).batch_at(40), late)


@settings(max_examples=60, deadline=None)
@given(step=st.integers(0, 10**6), rows=st.lists(st.integers(0, B - 1), max_size=6),
       seed=st.integers(0, 2**40))
def test_any_rows_of_any_step(sets, step, rows, seed):
    loader = load(sets[:2], weights=[2, 1], seed=seed)
    assert np.array_equal(loader.batch_at(step, np.array(rows, int)), loader.batch_at(step)[rows])


def test_every_epoch_holds_every_record_once_and_in_another_order(sets):
    n, epochs = sum(TRAIN), 4
    stream = order(load(sets[:1]), n * epochs)  # 23 rows an epoch: batches of 4 cross its ends
    per_epoch = [stream[e * n:(e + 1) * n] for e in range(epochs)]
    assert all(sorted(one) == list(range(n)) for one in per_epoch)
    assert len({tuple(one) for one in per_epoch}) == epochs


def test_the_order_belongs_to_seed_split_and_set(tmp_path, sets):
    n = sum(TRAIN)
    orders = {seed: order(load(sets[:1], seed=seed), 2 * n) for seed in range(5)}
    halves = [tuple(o[i:i + n]) for o in orders.values() for i in (0, n)]
    assert len(set(halves)) == 10  # and no seed begins with the second epoch of another
    alike = make_set(tmp_path / "alike", train=(10,), validation=(10,))
    assert order(load([alike]), 10) != order(load([alike], split="validation"), 10)
    mixed = np.concatenate([load(sets[:2], B=2).batch_at(s) for s in range(n)])
    first, second = (mixed[mixed[:, 0] == k, 1].tolist() for k in (0, 1))
    assert first != second
    assert first == order(load(sets[:1]), n)  # joining a mixture leaves a set's own order


def test_the_order_is_the_one_that_runs_were_started_with(sets):
    """A new grain or an edit here that moves the stream must not pass unseen: old runs could
    not be resumed. If it is meant, raise STREAM_FORMAT, so that resuming refuses."""
    def shuffled(seed):
        return [index_shuffle(i, max_index=22, seed=seed, rounds=4) for i in range(23)]

    name = f"1/train/{Manifest.load(sets[0]).fingerprint}"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    assert order(load(sets[:1], seed=1), 46) == shuffled(seed) + shuffled((seed + 1) % 2**32)
    assert shuffled(7) == GOLDEN


def test_records_are_sequential_and_ignore_the_seed(sets):
    loader = load(sets[:2], split="validation", seed=5)
    assert len(loader) == 14
    expected = [[k, r] for k in (0, 1) for r in range(7)]
    assert loader.records(0, 14)[:, :2].tolist() == expected
    assert loader.records(5, 9)[:, :2].tolist() == expected[5:9]
    assert loader.records(3, 3).shape == (0, T + 1)
    with pytest.raises(IndexError):
        loader.records(10, 15)


@pytest.mark.parametrize("limit, expected", [(None, 14), (9, 9), (8, 8), (100, 14)])
def test_sequential_gives_each_record_once_and_masks_the_padding(sets, limit, expected):
    loader = load(sets[:2], split="validation")
    items = list(loader.sequential(limit=limit))
    assert len(items) == -(-expected // B) and all(batch.shape == (B, T + 1) for batch, _ in items)
    kept = np.concatenate([batch[mask] for batch, mask in items])
    assert np.array_equal(kept, loader.records(0, expected))
    assert all((batch[~mask] == 0).all() for batch, mask in items)


def test_fingerprint_is_what_decides_the_batches(sets):
    base = load(sets[:2], weights=[1, 2]).fingerprint
    assert len(base) == 64
    for same in (load(sets[:2], weights=[0.5, 1.0], seed=9, B=16, V=2000),):
        assert same.fingerprint == base
    for other in (load(sets[:2], weights=[2, 1]), load(sets[1::-1], weights=[2, 1]),
                  load(sets[1:], weights=[1, 2]), load(sets[:1]),
                  load(sets[:2], weights=[1, 2], split="validation")):
        assert other.fingerprint != base


# Mixtures

@pytest.mark.parametrize("weights, expected", [
    ([1.0], (1,)), ([0.3, 0.7], (3, 7)), ([6, 14], (3, 7)), ([1, 1e-6], (10**6, 1)),
    ([0.1, 0.2, 0.3], (1, 2, 3)), ([np.float64(0.25), 0.5], (1, 2)),
])
def test_proportions_read_weights_as_written(weights, expected):
    assert proportions(weights) == expected


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.integers(1, 50), min_size=1, max_size=6), n=st.integers(1, 300))
def test_interleave_keeps_the_shares_at_every_row(parts, n):
    chosen = [Interleave(parts)[row] for row in range(n)]
    counts = Counter()
    for row, (stream, index) in enumerate(chosen):
        assert index == counts[stream]  # each stream in order, without gaps
        counts[stream] += 1
        for k, part in enumerate(parts):
            assert abs(counts[k] - (row + 1) * part / sum(parts)) <= len(parts)
    total = sum(parts)
    assert Counter(Interleave(parts)[row][0] for row in range(total)) == dict(enumerate(parts))


def test_interleave_far_out_needs_no_earlier_rows():
    row = 10**15 + 7
    stream, index = Interleave((3, 7))[row]
    assert abs(index - row * (3, 7)[stream] / 10) <= 1


def test_a_mixture_has_its_weights(sets):
    loader = load(sets, weights=[0.5, 0.3, 0.2], B=20)
    for step in range(3):
        assert Counter(loader.batch_at(step)[:, 0].tolist()) == {0: 10, 1: 6, 2: 4}


# Prefetching and devices

@pytest.mark.parametrize("threads, ahead", [(1, 1), (2, 8), (5, 5)])
def test_prefetching_changes_nothing(sets, threads, ahead):
    loader = load(sets, weights=[1, 2, 3])
    with loader.batches(3, 40, threads=threads, ahead=ahead) as batches:
        assert np.array_equal(list(batches), [loader.batch_at(s) for s in range(3, 40)])
    assert list(loader.batches(5, 5)) == []


def test_reading_starts_before_the_first_batch_is_asked_for():
    started = threading.Event()
    with Prefetched(lambda step: started.set(), 0, 3, threads=1, ahead=1):
        assert started.wait(timeout=10)


def test_stall_is_the_time_the_consumer_waits():
    def slow(step):
        time.sleep(0.05)
        return step

    with Prefetched(slow, 0, 10, threads=1, ahead=4) as items:
        assert list(items) == list(range(10))
    assert items.stall_seconds > 0.3  # of the 0.5 s that reading takes
    with Prefetched(slow, 0, 5, threads=2, ahead=4) as items:
        for _ in range(5):
            time.sleep(0.1)
            next(items)
    assert items.stall_seconds < 0.15  # of 0.25 s


def test_an_error_in_a_thread_reaches_the_consumer_at_its_step():
    def fails(step):
        if step >= 6:
            raise UserError(f"record of step {step}")
        return step

    items = Prefetched(fails, 0, 20, threads=4, ahead=8)
    assert [next(items) for _ in range(6)] == list(range(6))
    with pytest.raises(UserError, match="record of step 6"):
        next(items)
    items.close()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("slice", "data", "model"))


def test_sharded_batches_are_the_global_batch(sets, mesh):
    loader = load(sets, B=8)
    sharding = NamedSharding(mesh, P(("slice", "data")))
    for step, batch in zip(range(2, 9), loader.batches(2, 9, sharding), strict=True):
        expected = loader.batch_at(step)
        assert batch.sharding == sharding and np.array_equal(batch, expected)
        for shard in batch.addressable_shards:
            assert shard.data.shape == (2, T + 1)
            assert np.array_equal(shard.data, expected[shard.index])


def test_sharded_sequential_equals_the_unsharded_one(sets, mesh):
    loader = load(sets[:2], split="validation")
    sharding = NamedSharding(mesh, P("data"))
    pairs = zip(loader.sequential(4), loader.sequential(4, sharding), strict=True)
    for (plain, mask), (batch, sharded_mask) in pairs:
        assert batch.sharding == sharding and np.array_equal(batch, plain)
        assert np.array_equal(mask, sharded_mask)


def test_a_batch_that_does_not_split_over_the_mesh(sets, mesh):
    with pytest.raises(UserError, match=r"batch of 6 rows.*'slice': 2, 'data': 2.*multiple"):
        load(sets, B=6).batches(0, 2, NamedSharding(mesh, P(("slice", "data"))))


@pytest.fixture
def free_port() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


ONE_OF_TWO_PROCESSES = """
import json, sys
import jax, numpy as np
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from jax.sharding import NamedSharding, PartitionSpec as P
from spectra_jax.data.manifest import Manifest, Shard, Split
from spectra_jax.data.loader import Loader, RecordReader
read, plain = [], RecordReader.__getitem__
RecordReader.__getitem__ = lambda self, i: (read.append(int(i)), plain(self, i))[1]
loader = Loader([(folder, 1.0)], split="train", T=8, B=8, V=1000, seed=0)
sharding = NamedSharding(jax.make_mesh((1, 2, 2), ("slice", "data", "model")), P(("slice", "data")))
out = [[(s.index[0].start, np.asarray(s.data).tolist()) for s in batch.addressable_shards]
       for batch in loader.batches(0, 3, sharding)]
print(json.dumps({"read": read, "shards": out}))
"""


def test_two_real_processes_read_only_their_rows(sets, tmp_path, free_port):
    script = tmp_path / "process.py"
    script.write_text(ONE_OF_TWO_PROCESSES)
    root = str(Path(__file__).parents[2])
    processes = [subprocess.Popen([sys.executable, str(script), str(rank), free_port, sets[0]],
                                  cwd=root, env=os.environ | {"PYTHONPATH": root},
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for rank in range(2)]
    finished = [process.communicate(timeout=90) for process in processes]
    for process, (_, err) in zip(processes, finished):
        assert process.returncode == 0, err
    loader = load(sets[:1], B=8)
    for rank, (text, _) in enumerate(finished):
        result = json.loads(text)
        mine = [loader.batch_at(s, slice(4 * rank, 4 * rank + 4)) for s in range(3)]
        assert sorted(result["read"]) == sorted(np.concatenate(mine)[:, 1].tolist())
        for part, shards in zip(mine, result["shards"], strict=True):
            assert len(shards) == 2  # the two devices of the model axis hold the same rows
            assert all(start == 4 * rank and data == part.tolist() for start, data in shards)
