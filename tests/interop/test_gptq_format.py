"""Packed GPTQ checkpoints: read back as the format's readers do, with shifts and masks on whole words."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny, trained
from safetensors.numpy import load_file

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.interop import gptq_format, hf
from spectra_jax.model.parameters import block_matrices
from spectra_jax.quantize.gptq import gptq
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.schema import Quantize
from spectra_jax.serve.load import load

M, N = 96, 64


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Each column of words as one long number of which every value is a slice."""
    columns = [int.from_bytes(np.ascontiguousarray(column).astype("<u4").tobytes(), "little") for column in words.T]
    return np.array([[column >> bits * k & 2**bits - 1 for k in range(count)] for column in columns]).T


def read(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """The matrix (in, out) of the four tensors: scale[g] * (code - (zero[g] + 1))."""
    m, n = len(tensors["g_idx"]), tensors["scales"].shape[1]
    codes = unpacked(tensors["qweight"].view(np.uint32), bits, m)
    zeros = unpacked(tensors["qzeros"].view(np.uint32).T, bits, n).T + 1 & 2**bits - 1
    scales, group = tensors["scales"].astype(np.float32), tensors["g_idx"]
    return scales[group] * (codes - zeros[group]).astype(np.float32)


@pytest.mark.parametrize("grid", ["gptq", "gptq_asymmetric"])
@pytest.mark.parametrize("bits", gptq_format.BITS)
def test_what_is_packed_is_what_was_quantized(bits, grid):
    rng = np.random.default_rng(bits)
    x = rng.standard_normal((400, M))
    q = Quantize(method="gptq", bits=bits, grid=grid, group=32, block=32, act_order=bits == 3)
    # One matrix with a column without negative weights, whose zero point is 0.
    w = np.float32(rng.standard_normal((M, N)))
    w[:, 0] = np.abs(w[:, 0])
    found = gptq(jnp.asarray(w), jnp.asarray(x.T @ x, jnp.float32), q)
    tensors = gptq_format.packed(found, "q")
    assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == {
        "qweight": ("int32", (M * bits // 32, N)), "qzeros": ("int32", (M // 32, N * bits // 32)),
        "scales": ("float16", (M // 32, N)), "g_idx": ("int32", (M,)),
    }
    np.testing.assert_array_equal(read(tensors, bits), found.dequantize())


def test_an_exported_folder(tmp_path):
    """Every tensor of a small QuantLM, and what config.json says of them."""
    settings = ("method=gptq", "bits=4", "group=16", "block=16", "samples=16", "batch=8", "true_sequential=True")
    config = configs.override(tiny(), ["family=QuantLM", "name=q", *(f"quantize.{text}" for text in settings)])
    run = quantize(str(trained()), config, tmp_path / "q")
    hf.export(str(run), tmp_path / "hf", packed=True)
    tensors, model = load_file(tmp_path / "hf" / "model.safetensors"), load(str(run), devices=jax.devices()[:1])
    for (module, name), form in block_matrices(model.parameters).items():
        for layer in range(2):
            stem = f"model.layers.{layer}.{hf.THEIRS[module].format(name)}."
            parts = {part: tensors[stem + part] for part in ("qweight", "qzeros", "scales", "g_idx")}
            whole = jax.tree.map(lambda leaf, layer=layer: leaf[layer], form).dequantize()
            np.testing.assert_array_equal(read(parts, 4), whole)
    assert not any("_proj.weight" in name for name in tensors)
    said = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "gptq" and (said["bits"], said["group_size"], said["sym"]) == (4, 16, True)


def test_what_cannot_be_packed(tmp_path):
    w, h = jnp.ones((M, N)), jnp.eye(M)
    for q, message in (
        (Quantize(bits=6, group=32), "q .96 x 64. has 6 bits, .*the GPTQ format has 2, 3, 4, 8 bits"),
        (Quantize(bits=4, group=32, scale_dtype="float32"), "scales of float32"),
    ):
        with pytest.raises(UserError, match=message):
            gptq_format.packed(gptq(w, h, q), "q")
    with pytest.raises(UserError, match="3 bits, .* whole words of 32 bits"):
        gptq_format.packed(gptq(w[:, :20], h, Quantize(bits=3, group=32)), "q")
    with pytest.raises(UserError, match="has no matrices on uniform grids to pack"):
        hf.export(str(trained()), tmp_path / "hf", packed=True)
    assert not (tmp_path / "hf").exists()
