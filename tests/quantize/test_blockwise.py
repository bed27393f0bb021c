"""Block-wise data types: tables and codes are those of bitsandbytes, and the rest an exact search in float64."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import ROOT, logits, tiny, trained

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply, block_matrices, with_matrices
from spectra_jax.quantize.blockwise import blockwise, table
from spectra_jax.quantize.methods import get_method
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.schema import Quantize
from spectra_jax.serve.load import load

DOUBLE = ("method=blockwise_double", "grid=nf4", "group=16")


def settings(grid, bits=4, group=64, scale_dtype="float32"):
    return Quantize(method="blockwise", grid=grid, bits=bits, group=group, scale_dtype=scale_dtype)


def weights(outputs=96, inputs=256, seed=0):
    """As bitsandbytes has them, (out, in): normal, with a block of zeros and an outlier."""
    w = np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32) * 0.02
    w[3, 64:128], w[7, 5] = 0, 1.5
    return w


def our(w, q, **how):
    return blockwise(jnp.asarray(w.T), None, q, **how)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("grid", ["nf4", "fp4"])
def test_four_bits_are_the_bytes_of_bitsandbytes(grid, group):
    w = weights()
    packed, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=group, quant_type=grid)
    book = our(w, settings(grid, group=group))
    codes = np.asarray(book.codes).T.reshape(-1)
    np.testing.assert_array_equal(codes[::2] << 4 | codes[1::2], packed.numpy().ravel())
    np.testing.assert_array_equal(np.asarray(book.scales).T.ravel(), state.absmax.numpy())
    np.testing.assert_array_equal(book.table, state.code.numpy())
    np.testing.assert_array_equal(book.dequantize(), bnb.dequantize_4bit(packed, state).numpy().T)


def test_tables():
    for name in ("nf4", "fp4"):
        np.testing.assert_array_equal(table(name, 4), bnb.get_4bit_type(name, "cpu").numpy())
    np.testing.assert_array_equal(table("af4", 4), bnb.get_4bit_type("af4", "cpu").numpy()[::-1])
    np.testing.assert_array_equal(table("fp8", 8), bnb.create_fp8_map(True, 5, 2, 8).numpy())
    # bitsandbytes computes these in float32; ours are exact before they are rounded to it.
    np.testing.assert_allclose(table("dynamic", 8), bnb.create_dynamic_map().numpy(), rtol=1.3e-7)
    np.testing.assert_allclose(table("linear", 8), bnb.create_linear_map(add_zero=True).numpy(), rtol=0, atol=6e-8)
    for bits in range(2, 8):  # there filled up with zeros to 256 values
        theirs = np.unique(bnb.create_dynamic_map(True, bits - 1, bits).numpy())
        np.testing.assert_allclose(table("dynamic", bits), theirs, rtol=1.3e-7)


def test_bytes_are_those_of_bitsandbytes():
    """Of its exact search; on a CPU it looks 32-bit floats up in 65,536 bins instead, and so are some others."""
    w, code = torch.from_numpy(weights()), bnb.create_dynamic_map()
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(w.double(), code, 64)
    binned, _ = bnb.quantize_blockwise(w, code, blocksize=64)
    book = our(w.numpy(), settings("dynamic", bits=8))
    found = np.asarray(book.codes).T
    filled = np.repeat(np.asarray(book.scales).T > 0, 64, axis=1)  # a block of zeros is code 0 there, times 0
    print("codes that differ:", np.mean(found != codes.numpy()), "from the binned:", np.mean(found != binned.numpy()))
    np.testing.assert_array_equal(found[filled], codes.numpy()[filled])
    np.testing.assert_array_equal(np.asarray(book.scales).T.ravel(), absmax.numpy())

    x = np.clip(w.numpy().reshape(-1, 64) * (1 / np.maximum(absmax.numpy(), 1e-30))[:, None], -1, 1).astype(np.float32)
    bins = np.trunc((x + np.float32(1)) / 2 * np.float32(65535) + np.float32(0.5)).astype(int)
    centres = (bins / 65535 * 2 - 1).reshape(filled.shape)
    np.testing.assert_array_equal(exact(centres, code.numpy())[filled], binned.numpy()[filled])


def exact(x, values):
    """The nearest of sorted values in float64, the lower of two."""
    return np.argmin(np.abs(x[..., None].astype(np.float64) - values.astype(np.float64)), axis=-1)


@pytest.mark.parametrize(
    "grid, bits", [("linear", 3), ("linear", 8), ("dynamic", 5), ("af4", 4), ("fp8", 8), ("quantile", 4)]
)
def test_other_types_against_an_exact_search(grid, bits):
    w = weights(outputs=48, inputs=128)
    book = our(w, settings(grid, bits=bits))
    if grid == "quantile":
        count = 2**bits - 1
        values = np.quantile(w.astype(np.float64), (np.arange(count) + 0.5) / count)
        values = np.sort(np.append(values / np.abs(values).max(), 0))
        np.testing.assert_allclose(book.table, values, rtol=1e-5, atol=1e-7)
    blocks = w.reshape(-1, 64).astype(np.float64)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    x = (blocks / np.where(absmax == 0, 1, absmax)).reshape(w.shape)
    values = np.asarray(book.table, np.float64)
    found, expected = values[np.asarray(book.codes).T], values[exact(x, values)]  # linear has 0 twice
    print(grid, bits, "values that differ:", np.mean(found != expected))
    assert np.mean(found != expected) < 1e-3  # float32 sees a few of them on the other side of a midpoint
    np.testing.assert_allclose(np.abs(found - x), np.abs(expected - x), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        book.dequantize(), (found * np.repeat(absmax, 64).reshape(w.shape)).T, rtol=1e-6, atol=1e-9
    )


def test_double_quantization():
    w = weights(outputs=97, inputs=256)  # 388 scales: one block of 256, and the rest
    packed, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True)
    book = our(w, settings("nf4", scale_dtype="float16"), double=True)
    codes = np.asarray(book.codes).T.reshape(-1)
    np.testing.assert_array_equal(codes[::2] << 4 | codes[1::2], packed.numpy().ravel())
    np.testing.assert_allclose(book.scales.offset, state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(book.scales.scales, state.state2.absmax.numpy(), rtol=1e-6)
    absmax = np.abs(w.reshape(-1, 64)).max(axis=1)
    theirs, _ = torch.ops.bitsandbytes.quantize_blockwise.default(
        torch.from_numpy(absmax - state.offset.numpy()).double(), state.state2.code, 256
    )
    found = np.asarray(book.scales.codes).T.ravel()
    print("codes of scales that differ:", np.mean(found != theirs.numpy()), np.mean(found != state.absmax.numpy()))
    np.testing.assert_array_equal(found, theirs.numpy())
    # bitsandbytes' own scales come from 65,536 bins
    gap = np.abs(np.asarray(book.dequantize()).T - bnb.dequantize_4bit(packed, state).numpy())
    assert gap.max() < 2e-2 * np.abs(w).max() and np.mean(gap > 1e-6) < 0.05
    assert book.stored_bits() == 4 * w.size + 8 * 388 + 32 * 2 + 32 + 32 * (256 + 16)


def test_what_the_types_are_for():
    """Types made of quantiles are the best for normal weights; more bits and smaller blocks are better."""
    w = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32)
    error = lambda *how: float(np.mean(np.abs(np.asarray(our(w, settings(*how)).dequantize()).T - w)))  # noqa: E731
    nf4, af4, fp4 = (error(grid) for grid in ("nf4", "af4", "fp4"))
    linear, dynamic, quantile = (error(grid, 4) for grid in ("linear", "dynamic", "quantile"))
    print(dict(nf4=nf4, af4=af4, fp4=fp4, linear=linear, dynamic=dynamic, quantile=quantile))
    assert max(nf4, af4, quantile) < linear < fp4 < dynamic
    assert error("linear", 6) < error("linear", 5) < linear and error("nf4", 4, 32) < nf4 < error("nf4", 4, 256)


def test_scales_in_fewer_bits():
    w = weights()
    half, full = (our(w, settings("nf4", scale_dtype=dtype)) for dtype in ("float16", "float32"))
    assert half.stored_bits() + 16 * half.scales.size == full.stored_bits()
    same = half.codes == full.codes  # weights at a midpoint may go the other way
    gap = np.abs(half.dequantize() - full.dequantize())[same]
    assert np.mean(same) > 0.999 and np.all(gap <= 2.0**-11 * np.abs(full.dequantize())[same] + 1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group": 60}, r"group=60 does not divide the 256 inputs of matrix; use 64"),
        ({"grid": "nf5"}, r"grid='nf5' is not one of .*; did you mean nf4"),
        ({"bits": 3}, r"grid=nf4 has 4 bits, not config.quantize.bits=3; use --config.quantize.bits=4"),
        ({"grid": "af4", "group": 128}, r"af4 is made for blocks of 64 weights, not of 128"),
    ],
)
def test_refused(change, message):
    q = configs.override(tiny(), [f"quantize.{key}={value}" for key, value in change.items()]).quantize
    base = {"grid": "nf4", "group": 64} | change
    with pytest.raises(UserError, match=message):
        our(weights(), Quantize(bits=q.bits, **{k: v for k, v in base.items() if k != "bits"}))


def test_a_grid_that_the_method_has_not():
    for method, grid, near in (("blockwise", "gptq", "nf4"), ("gptq", "nf4", "gptq"), ("rtn", "absmx", "absmax")):
        with pytest.raises(UserError, match=rf"method={method}, config.quantize.grid='{grid}' is not one of.*{near}"):
            get_method(method, grid)


@pytest.mark.parametrize("preset", ["awq", "nf4", "fp4", "nf4-double", "smoothquant", "llm_int8"])
def test_presets(preset):
    q = configs.load(f"{ROOT}/configs/quantlm.py:{preset}").quantize
    w = np.random.default_rng(3).standard_normal((256, 128)).astype(np.float32)
    form = get_method(q.method, q.grid).matrix(jnp.asarray(w), None, q, "matrix")
    bits = form.stored_bits() / w.size
    expected = {
        "awq": 4 + (16 + 4) / 128, "nf4": 4 + 32 / 64 + 16 / 1024, "fp4": 4 + 32 / 64 + 16 / 1024,
        "nf4-double": 4 + (512 + 2 * 4 + 4 + 17 * 64) / 4096, "smoothquant": 8 + 16 / 256, "llm_int8": 8 + 32 / 256,
    }  # fmt: skip
    print(preset, bits)
    assert bits == expected[preset]
    error = float(jnp.sqrt(jnp.mean(jnp.square(form.dequantize() - w))))
    assert error < (0.13 if q.bits == 4 else 0.01)


@pytest.mark.slow  # over 20 seconds where a core is shared
def test_a_model(tmp_path):
    """What is written and read back predicts as the float model does with the rounded matrices in it."""
    run, out = trained(), tmp_path / "run"
    config = configs.override(tiny(), [f"quantize.{setting}" for setting in DOUBLE])
    quantize(str(run), config, out)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    before, after = logits(run, tokens), logits(out, tokens)
    model = load(str(run), devices=jax.devices()[:1])
    with jax.set_mesh(model.mesh):
        rounded = {
            key: jnp.stack([blockwise(w, None, config.quantize, double=True).dequantize() for w in ws])
            for key, ws in block_matrices(model.parameters).items()
        }
        parameters = model.parameters | {"blocks": with_matrices(model.parameters["blocks"], rounded)}
        expected = apply(model.graphdef, parameters)(jnp.asarray(tokens))
    np.testing.assert_allclose(after, expected, atol=1e-5)
    gap = np.abs(after - before).max() / np.abs(before).max()
    print("relative change of logits:", gap)
    assert 1e-4 < gap < 0.06  # 4-bit weights, off by 8 %
