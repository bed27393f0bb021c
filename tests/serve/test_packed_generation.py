"""Text from packed weights is the text from dense ones, and so is that of a run packed on the disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TERNARY, spectra, trained

import spectra_jax
from spectra_jax.errors import UserError
from spectra_jax.schema import Mesh
from spectra_jax.serve.generate import Generator
from spectra_jax.serve.head import in_bytes
from spectra_jax.serve.pack import pack

PROMPTS = ["the whale", "1729 of"]


@pytest.mark.parametrize("weights", ["packed", "cpu", "xla"])
@pytest.mark.parametrize("family", [(*TERNARY, "model.scale_shards=2"), ("model.weight=bitnet158",)])
def test_the_same_greedy_tokens(family, weights):
    run = str(trained(*family))
    dense, packed = spectra_jax.load(run), spectra_jax.load(run, weights=weights)
    options = {"max_new_tokens": 6, "temperature": 0.0}
    assert packed.weights == ("cpu" if weights == "packed" else weights)
    expected, found = (model.generate(PROMPTS, **options) for model in (dense, packed))
    assert found == expected


def test_a_packed_run_writes_the_same(tmp_path):
    run, out = trained(*TERNARY), tmp_path / "packed"
    pack(str(run), out, trits=True, dtype="float32")
    options = {"max_new_tokens": 6, "temperature": 0.0}
    expected, found = (spectra_jax.load(str(path)).generate(PROMPTS, **options) for path in (run, out))
    assert found == expected


def test_a_head_in_8_bits(make):
    loaded = make("ternary", V=304)
    head = np.asarray(loaded.parameters["head"], np.float64)
    with jax.set_mesh(loaded.mesh):
        planes = in_bytes(loaded.parameters)
        x = np.random.default_rng(0).standard_normal((3, head.shape[0])).astype(np.float32)
        y = planes.product(jnp.asarray(x))
    scales = np.abs(head).max(0) / 127
    rounded = np.rint(head / scales) * scales
    bound = np.abs(x).max(-1, keepdims=True) * 2**-14.9 * np.abs(128 * scales * len(head)) + 1e-4
    assert np.all(np.abs(y - x @ rounded) <= bound)


def test_packed_with_an_8_bit_head_writes(make):
    options = {"max_new_tokens": 6, "temperature": 0.0}
    for mesh in (Mesh(1, 1, 1), Mesh(1, 2, 2)):
        model = Generator(make("ternary", scale_shards=2, mesh=mesh), weights="packed", head="int8")
        found = model.generate(PROMPTS, **options)
        assert found == Generator(make("ternary", scale_shards=2)).generate(PROMPTS, **options)


def test_misfits_are_refused(make):
    with pytest.raises(UserError, match="its embedding"):
        Generator(make(tie_embeddings=True), head="int8")
    with pytest.raises(UserError, match="head"):
        Generator(make(), head="int4")
    with pytest.raises(UserError, match="ternary and binary models"):
        spectra_jax.load(str(trained()), weights="packed")
    done = spectra("generate", f"--checkpoint={trained(*TERNARY)}", "--prompt=the", "--weights=gpu")
    assert done.returncode == 2 and "'gpu' cannot serve" in done.stderr


@pytest.mark.parametrize("weights", ["cpu", "xla"])
def test_on_a_mesh(make, weights):
    one = Generator(make("ternary", scale_shards=2))
    mesh = Generator(make("ternary", scale_shards=2, mesh=Mesh(1, 2, 2)), weights=weights)
    codes = mesh._parameters["blocks"]["mlp"]["down"]["w"][0].matrix.data
    assert codes.shape[0] == 2 and codes.addressable_shards[0].data.shape[0] == 1
    options = {"max_new_tokens": 6, "temperature": 0.0}
    assert mesh.generate(PROMPTS, **options) == one.generate(PROMPTS, **options)
