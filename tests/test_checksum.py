"""Checksums hold on any mesh, and any change of a value, of a place or of a name changes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spectra_jax.checksum import checksums, wrong
from spectra_jax.sharding import AXES


def by_hand(x: np.ndarray) -> str:
    """The same sums in Python's integers, element by element."""
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}[x.dtype.itemsize]
    plain = weighted = 0
    for position, word in enumerate(np.ascontiguousarray(x).reshape(-1).view(width).tolist()):
        mixed = word ^ (position + 1) * 0x9E3779B1 % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        mixed ^= mixed >> 16
        plain += mixed
        weighted += mixed * (2 * position + 1)
    return f"{plain % 2**32:08x}{weighted % 2**32:08x}"


def draw(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.int8, jnp.uint8, jnp.bool_])
def test_of_every_dtype(dtype):
    x = jnp.asarray(100 * draw(5, 3, 7), dtype)
    assert checksums({"x": x}) == {"x": by_hand(np.asarray(x))}


def test_names_are_paths_and_scalars_count():
    tree = {"a": {"b": jnp.float32(2)}, "c": (jnp.arange(3), jnp.zeros((0, 4)))}
    found = checksums(tree)
    assert list(found) == ["a.b", "c.0", "c.1"]
    assert found["a.b"] == by_hand(np.float32(2)) and found["c.1"] == "0" * 16


@pytest.mark.parametrize("spec", [P("data"), P(None, "data", "model"), P(("slice", "data"), "model"), P()])
def test_on_any_mesh(spec):
    x = draw(16, 24, 8)
    mesh = jax.make_mesh((2, 2, 2), AXES)
    with jax.set_mesh(mesh):
        assert checksums({"x": jax.device_put(x, NamedSharding(mesh, spec))}) == {"x": by_hand(x)}


def test_any_change_is_seen():
    x = draw(6, 10)
    sums = {by_hand(x)}
    for bit in range(0, 8 * x.nbytes, 7):
        changed = bytearray(x.tobytes())
        changed[bit // 8] ^= 1 << bit % 8
        sums.add(checksums({"x": jnp.asarray(np.frombuffer(changed, np.float32).reshape(x.shape))})["x"])
    swapped = x.copy()
    swapped[0, 0], swapped[5, 9] = x[5, 9], x[0, 0]
    negated = x.copy()
    negated[:2, 0] *= -1  # two sign bits: a plain sum would not notice
    others = [swapped, negated, x.T.copy(), x[:, ::-1], np.zeros_like(x)]
    sums |= {checksums({"x": jnp.asarray(other)})["x"] for other in others}
    assert len(sums) == 1 + len(range(0, 8 * x.nbytes, 7)) + len(others)


def test_what_is_wrong_is_named():
    assert wrong({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    assert wrong({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b", "c"]
    assert wrong({"a": "1", "b": "2"}, {"a": "1"}) == ["b"]
