"""A packed run is the model that it was made of, in as many bytes as its account says."""


import jax
import numpy as np
import pytest
from helpers import TERNARY, assert_same_logits, logits, spectra, trained

from spectra_jax.errors import UserError
from spectra_jax.serve.load import load
from spectra_jax.serve.pack import pack
from spectra_jax.weights.form import is_form

TINY = {"float16": 2.0**-14, "bfloat16": 2.0**-126}  # below, float formats have fewer bits
FAMILIES = {
    "ternary": ((*TERNARY, "model.scale_shards=2"), False), "trits": ((*TERNARY, "model.scale_shards=2"), True),
    "binary": (("model.weight=binary",), False), "bitnet": (("model.weight=bitnet158",), True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model(tmp_path, family):
    overrides, trits = FAMILIES[family]
    run, out = trained(*overrides), tmp_path / "packed"
    print(pack(str(run), out, trits=trits, dtype="float32"))
    before, after = load(str(run)), load(str(out))
    assert jax.tree.structure(before.parameters) == jax.tree.structure(after.parameters)
    assert all(np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(m.parameters) for m in (before, after))))
    assert after.step == before.step and after.record["tokens"] == before.record["tokens"]
    tokens = np.random.RandomState(0).randint(0, 300, (2, 16))
    assert_same_logits(logits(out, tokens), logits(run, tokens), rounds=family == "bitnet")  # theirs is latent


@pytest.mark.parametrize("dtype, bound", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_what_is_not_quantized_is_rounded_and_said(tmp_path, dtype, bound):
    run, out = trained(*TERNARY), tmp_path / "packed"
    done = spectra("pack", f"--checkpoint={run}", f"--out={out}", f"--dtype={dtype}")
    assert done.returncode == 0, done.stderr
    said = float(done.stdout.split()[-1])
    a, b = (load(str(path)).parameters["embedding"] for path in (run, out))
    assert b.dtype == np.float32 and not np.array_equal(a, b)
    np.testing.assert_allclose(a, b, rtol=bound, atol=1e-7)
    leaves = [jax.tree.leaves(load(str(path)).parameters, is_leaf=is_form) for path in (run, out)]
    floats = [[np.asarray(x) for x in some if not is_form(x)] for some in leaves]
    changes = [np.max(np.abs(b - a) / np.maximum(np.abs(a), TINY[dtype])) for a, b in zip(*floats)]
    assert said == pytest.approx(max(changes), rel=0.06)  # printed with two digits


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a float model .* and has no codes to pack; quantize it"):
        pack(str(trained()), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced_and_dtypes_are_known(tmp_path):
    (tmp_path / "packed").mkdir()
    with pytest.raises(UserError, match="exists"):
        pack(str(trained(*TERNARY)), tmp_path / "packed")
    with pytest.raises(UserError, match="float61.*float16"):
        pack(str(trained(*TERNARY)), tmp_path / "other", dtype="float61")
