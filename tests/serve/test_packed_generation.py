"""Text from packed weights is the text from dense ones, and so is that of a run packed on the disk."""

import pytest
from helpers import TERNARY, spectra, trained

import spectra_jax
from spectra_jax.errors import UserError
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


def test_misfits_are_refused():
    with pytest.raises(UserError, match="ternary and binary models"):
        spectra_jax.load(str(trained()), weights="packed")
    done = spectra("generate", f"--checkpoint={trained(*TERNARY)}", "--prompt=the", "--weights=gpu")
    assert done.returncode == 2 and "'gpu' cannot serve" in done.stderr
