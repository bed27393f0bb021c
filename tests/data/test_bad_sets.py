"""Sets that are missing, damaged or do not fit the run are named, when they are opened or when they are read."""

from pathlib import Path

import grain
import pytest
from test_loader import B, T, V, load, make_set, order, write_shard

from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError


def damage(path: Path, edit) -> None:
    data = bytearray(path.read_bytes())
    path.write_bytes(edit(data))


@pytest.fixture
def one(tmp_path) -> Path:
    return make_set(tmp_path / "one")


def test_missing_folder_and_missing_manifest(tmp_path, one):
    with pytest.raises(UserError, match="nowhere"):
        load([tmp_path / "nowhere"])
    (one / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json"):
        load([one])


def test_other_context_length(one):
    with pytest.raises(UserError, match=r"T=8 .*T=16; prepare it again with --context=16"):
        load([one], T=16)


def test_vocabulary_larger_than_the_models(one):
    with pytest.raises(UserError, match="vocabulary of 1000, the model has V=512"):
        load([one], V=512)


def test_mixture_of_two_tokenizers(tmp_path, one):
    other = make_set(tmp_path / "other", 1, tokenizer="b")
    with pytest.raises(UserError, match="one.*other.*different tokenizers"):
        load([one, other])


def test_the_same_set_twice(one):
    with pytest.raises(UserError, match="hold the same data"):
        load([one, one])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_no_shares(tmp_path, one, weight):
    other = make_set(tmp_path / "other", 1)
    with pytest.raises(UserError, match="weights.*positive"):
        load([one, other], weights=[1.0, weight])


def test_no_sets_and_no_rows(one):
    with pytest.raises(UserError, match="0 prepared sets"):
        Loader([], split="train", T=T, B=B, V=V, seed=0)
    with pytest.raises(UserError, match="batch of 0 rows"):
        load([one], B=0)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_empty_or_unknown_split(tmp_path, split):
    folder = make_set(tmp_path / "set", validation=())
    with pytest.raises(UserError, match=f"split '{split}' holds no records.*'train': 23"):
        load([folder], split=split)


def test_missing_shard(one):
    (one / "train-00001.arrayrecord").unlink()
    with pytest.raises(UserError, match="train-00001.arrayrecord is missing.*5 records"):
        load([one])
    load([one], split="validation")


@pytest.mark.parametrize("keep", [0, 1000, 65536, -1])
def test_truncated_shard(one, keep):
    damage(one / "train-00002.arrayrecord", lambda data: data[:keep])
    with pytest.raises(UserError, match="train-00002.arrayrecord.*truncated"):
        load([one])


def test_wrong_record_count(one):
    write_shard(one / "train-00000.arrayrecord", [[0] * (T + 1)] * 6)
    with pytest.raises(UserError, match="train-00000.arrayrecord holds 6 records.*states 7"):
        load([one])


def corrupt_record(folder: Path, shard: str, position: int) -> None:
    """Flip one bit that a read of exactly this record trips over, found by trying."""
    path = folder / shard
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1:])
        try:
            source = grain.sources.ArrayRecordDataSource([str(path)])
        except RuntimeError:
            continue
        failing = []
        for i in range(len(source)):
            try:
                source[i]
            except RuntimeError:
                failing.append(i)
        if failing == [position]:
            return
    raise AssertionError("no such bit")


def test_corrupt_record_is_named_when_it_is_read(one):
    corrupt_record(one, "train-00001.arrayrecord", 2)  # record 9 of the split
    loader = load([one])
    step = order(load([make_set(one.parent / "good")]), 23).index(9) // B
    with loader.batches(0, 6) as batches:
        for _ in range(step):
            next(batches)
        with pytest.raises(UserError, match="record 2 of .*train-00001.arrayrecord is corrupt"):
            next(batches)
    with pytest.raises(UserError, match="train-00001.arrayrecord has sha256"):
        loader.verify()


def test_verify_finds_what_reading_cannot(one):
    loader = load([one])
    loader.verify()
    damage(one / "train-00000.arrayrecord", lambda data: data[:30000] + b"\1" + data[30001:])
    load([one]).records(0, 23)  # the byte lies in the padding of the file
    with pytest.raises(UserError, match="train-00000.arrayrecord has sha256"):
        loader.verify()


def test_token_beyond_the_vocabulary(tmp_path):
    folder = make_set(tmp_path / "set", tokens=[0, 1, 2, V, 4, 5, 6, 7, 8])
    with pytest.raises(UserError, match="record 0 of .*train-00000.* token id 1000,.*ends at 999"):
        load([folder]).records(0, 1)


def test_record_of_another_length(tmp_path):
    folder = make_set(tmp_path / "set", tokens=[0, 1, 2])
    with pytest.raises(UserError, match=r"record 0 of .* has 6 bytes, T \+ 1 = 9 tokens.* make 18"):
        load([folder]).records(0, 1)
