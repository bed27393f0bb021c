"""However a run is cut up, over hosts, threads, restarts and batch sizes, it reads one and the same stream of rows."""

import math
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from helpers import T, V, prepare_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

from spectra_jax.data.loader import Loader, Prefetched, local_rows
from spectra_jax.sharding import AXES, batch_sharding

ROWS = 84  # five epochs of the small set, where it is alone
# The same examples in every run, and none refused because the machine is slow.
repeatable = partial(settings, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=2)  # as many sets
SEEDS, THREADS, AHEAD, SIZES = st.integers(0, 2**40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("sets")
    small = prepare_set(root / "small", documents=8)
    return [small, prepare_set(root / "large", documents=13, seed=1, tokenizer=str(small / "tokenizer.json"))]


def load(folders, weights, B: int, seed: int) -> Loader:
    return Loader(list(zip(folders, weights)), split="train", T=T, B=B, V=V, seed=seed)


def plain_pass(loader: Loader, rows: int = ROWS) -> np.ndarray:
    """At least so many rows of the stream: every batch whole, in order, without threads."""
    return np.concatenate([loader.batch_at(step) for step in range(math.ceil(rows / loader.B))])


def stored(folder: Path) -> list[bytes]:
    """The training records as they lie on the disk, read without the loader."""
    return [record for path in sorted(folder.glob("train-*")) for record in ArrayRecordReader(str(path)).read_all()]


@repeatable(max_examples=18)
@given(WEIGHTS, SEEDS, SIZES, st.data())
def test_hosts_threads_and_restarts_change_no_batch(folders, weights, seed, B, data):
    steps = math.ceil(ROWS / B)
    owners = np.array(data.draw(st.lists(st.integers(0, 3), min_size=B, max_size=B), label="host of each row"))
    stops = [*sorted(data.draw(st.lists(st.integers(0, steps), max_size=3), label="stops")), steps]
    found = np.full((steps, B, T + 1), -1)
    for start, stop in zip([0, *stops], stops):
        with ExitStack() as stack:  # all hosts read at once, ahead of the step that they are stopped at
            for host in set(owners):
                rows = np.flatnonzero(owners == host)
                make = partial(load(folders, weights, B, seed).batch_at, rows=rows)
                threads, ahead = data.draw(THREADS, label="threads"), data.draw(AHEAD, label="ahead")
                batches = stack.enter_context(Prefetched(make, start, steps, threads, ahead))
                for step in range(start, stop):
                    found[step, rows] = next(batches)
    assert np.array_equal(found.reshape(-1, T + 1), plain_pass(load(folders, weights, B, seed)))


@repeatable(max_examples=18)
@given(WEIGHTS, SEEDS, SIZES, SIZES)
def test_rows_do_not_depend_on_the_size_of_the_batches(folders, weights, seed, B, other):
    one, two = (plain_pass(load(folders, weights, size, seed))[:ROWS] for size in (B, other))
    assert np.array_equal(one, two)


@repeatable(max_examples=30)
@given(WEIGHTS, SEEDS, SIZES)
def test_every_epoch_of_every_set_holds_each_record_once(folders, weights, seed, B):
    rows = [row.astype("<u2").tobytes() for row in plain_pass(load(folders, weights, B, seed))]
    shares = [weight / sum(weights) * len(rows) for weight in weights]
    for records, share in zip(map(stored, folders), shares):
        mine, n = [row for row in rows if row in records], len(records)
        assert abs(len(mine) - share) <= len(weights)
        epochs = [tuple(mine[start : start + n]) for start in range(0, len(mine), n)]
        assert all(not Counter(epoch) - Counter(records) for epoch in epochs)  # the last may be an incomplete one
        assert len(set(epochs)) == len(epochs)  # each in an order of its own


@repeatable(max_examples=30)
@given(WEIGHTS, st.integers(1, 40), THREADS, AHEAD, st.none() | st.integers(1, 60))
def test_evaluation_sees_each_record_once_in_stored_order(folders, weights, B, threads, ahead, limit):
    items = load(folders, weights, 1, 0).sequential(B, limit=limit, threads=threads, ahead=ahead)
    seen = [row.astype("<u2").tobytes() for batch, mask in items for row in batch[mask]]
    assert seen == [record for folder, _ in zip(folders, weights) for record in stored(folder)][:limit]


class OneHost(NamedSharding):
    """A sharding as one process of several sees it: only the devices in `mine` are its own."""

    mine = frozenset()

    def addressable_devices_indices_map(self, shape):
        return {device: index for device, index in self.devices_indices_map(shape).items() if device in self.mine}


@repeatable(max_examples=40)
@given(
    shape=st.sampled_from([(1, 8, 1), (2, 2, 2), (2, 4, 1), (4, 1, 2), (1, 2, 4), (1, 1, 8), (1, 3, 2)]),
    order=st.permutations(range(8)), hosts=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    share=st.integers(1, 3), threads=THREADS, ahead=AHEAD,
)
def test_every_device_gets_its_block_of_rows_and_a_host_reads_no_other(
    folders, shape, order, hosts, share, threads, ahead
):
    replicas, used = shape[0] * shape[1], math.prod(shape)  # one block of rows per replica, `share` rows in each
    devices = [jax.devices()[number] for number in order[:used]]
    blocks = {device: position // shape[2] for position, device in enumerate(devices)}
    sharding = batch_sharding(Mesh(np.array(devices).reshape(shape), AXES))
    for host in set(hosts[:used]):
        one = OneHost(sharding.mesh, sharding.spec)
        one.mine = {device for device, owner in zip(devices, hosts) if owner == host}
        expected = {blocks[device] * share + row for device in one.mine for row in range(share)}
        assert local_rows(one, replicas * share, T + 1).tolist() == sorted(expected)
    loader = load(folders, [1.0, 0.5], replicas * share, 0)
    with loader.batches(2, 4, sharding, threads=threads, ahead=ahead) as batches:
        for step, batch in zip((2, 3), batches, strict=True):
            whole = loader.batch_at(step).reshape(replicas, share, T + 1)
            assert all(np.array_equal(shard.data, whole[blocks[shard.device]]) for shard in batch.addressable_shards)
