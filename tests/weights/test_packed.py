"""Packed whole numbers are a stream of their bits, come back as they were, and make every stored form smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import api
from spectra_jax.quantize.rtn import rtn
from spectra_jax.schema import Quantize
from spectra_jax.weights.frozen import Frozen
from spectra_jax.weights.masked import Masked
from spectra_jax.weights.packed import Bits, bits, pack, spread, unpack

KINDS = {
    "int2": (-2, 2, np.int8), "int3": (-4, 4, np.int8), "int5": (-16, 16, np.int8), "int8": (-128, 128, np.int8),
    "uint1": (0, 2, np.bool_), "uint3": (0, 8, np.uint8), "uint6": (0, 64, np.uint8), "uint8": (0, 256, np.uint8),
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(8, 3), (37, 5), (2, 64, 4), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_bits(rng, kind, shape):
    low, high, dtype = KINDS[kind]
    array = rng.integers(low, high, shape).astype(dtype)
    packed = bits(jnp.asarray(array), kind)
    found = packed.unpacked()
    assert found.dtype == dtype and np.array_equal(found, array)
    # The same with numpy's bits: the lowest `width` of each number in turn, each output by itself.
    width = int(kind.lstrip("uint"))
    line = np.moveaxis(array.astype(np.uint8), -2, -1)  # numbers of one output side by side
    line = np.pad(line, [(0, 0)] * (line.ndim - 1) + [(0, -shape[-2] % 8)])
    single = np.unpackbits(line[..., None], axis=-1, bitorder="little")[..., :width]
    stream = np.packbits(single.reshape(*line.shape[:-1], -1), axis=-1, bitorder="little")
    assert np.array_equal(np.moveaxis(np.asarray(packed.data), -2, -1), stream)


def test_ternary_codes_are_the_canonical_storage(rng):
    codes = jnp.asarray(rng.integers(-1, 2, (40, 6)), jnp.int8)
    assert np.array_equal(bits(codes, "int2").data, api.pack(codes, "2bit"))
    assert np.array_equal(bits(codes, "trit").data, api.pack(codes, "5trit"))
    assert np.array_equal(bits(codes, "trit").unpacked(), codes)


def test_signs_take_a_bit(rng):
    signs = jnp.asarray(rng.choice([-1, 1], (24, 6)), jnp.int8)
    packed = bits(signs, "sign")
    assert packed.data.shape == (3, 6) and np.array_equal(packed.unpacked(), signs)


def forms(rng):
    w = jnp.asarray(rng.standard_normal((64, 48)), jnp.float32)
    settings = [Quantize(method="rtn", bits=b, group=16, grid=g) for b in (2, 3, 4, 6) for g in ("gptq", "awq")]
    grouped = [rtn(w, None, q) for q in settings]
    codes, scales = jnp.sign(w).astype(jnp.int8), jnp.ones((2,))
    ternary = Frozen(jnp.round(jnp.clip(w, -1, 1)).astype(jnp.int8), scales, 0, 2, 1.58)
    return [*grouped, ternary, Frozen(codes, scales, 1, 1, 1.0), Masked(w > 0, ternary, None)]


def test_every_form_comes_back_the_same(rng):
    for form in forms(rng):
        small = pack({"w": form})
        assert isinstance(getattr(small["w"], "mask" if isinstance(form, Masked) else "codes"), Bits)
        assert sum(x.nbytes for x in jax.tree.leaves(small)) < sum(x.nbytes for x in jax.tree.leaves(form))
        back = unpack(small, {"w": jnp.zeros((64, 48))})["w"]
        assert jax.tree.structure(back) == jax.tree.structure(form)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(*map(jax.tree.leaves, (back, form))))


@pytest.mark.parametrize(("trits", "inputs", "held"), [(False, 64, (8, 24)), (False, 36, (10, 24)), (True, 40, (4, 24)),
                                                       (True, 32, (7, 24))])
def test_every_device_reads_its_part(rng, trits, inputs, held):
    """Of 2 by 2 devices; where half the inputs are no whole bytes, all of them."""
    w = jnp.asarray(rng.integers(-1, 2, (2, inputs, 48)), jnp.int8)
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    like = jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=NamedSharding(mesh, P(None, "data", "model")))
    packed = pack({"w": Frozen(w, jnp.ones((2, 1)), axis=1)}, trits=trits)
    with jax.set_mesh(mesh):
        shapes = spread(jax.eval_shape(lambda: packed), {"w": like})
        there = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding or NamedSharding(mesh, P())), packed, shapes)
        found = unpack(there, {"w": like})["w"].codes
    assert there["w"].codes.data.addressable_shards[0].data.shape == (2, *held)
    assert np.array_equal(found, w) and found.sharding.spec == like.sharding.spec
