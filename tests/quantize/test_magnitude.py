"""Pruning by magnitude, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax.errors import UserError
from spectra_jax.quantize.magnitude import magnitude
from spectra_jax.schema import Quantize

W = np.random.default_rng(0).standard_normal((24, 10)).astype(np.float32)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
def test_the_smallest_go(sparsity):
    found = magnitude(jnp.asarray(W), None, Quantize(sparsity=sparsity, scale_dtype="float32"))
    limit = np.sort(np.abs(W).ravel())[int(W.size * sparsity)]
    np.testing.assert_array_equal(found.dequantize(), np.where(np.abs(W) < limit, 0, W))


def test_of_every_four_inputs_two_go():
    found = np.asarray(magnitude(jnp.asarray(W), None, Quantize(pattern="2:4", scale_dtype="float32")).dequantize())
    for i in range(0, 24, 4):
        for j in range(10):
            run = W[i : i + 4, j]
            kept = np.argsort(-np.abs(run))[:2]
            assert set(np.flatnonzero(found[i : i + 4, j])) == set(kept)
            np.testing.assert_array_equal(found[i + kept, j], run[kept])


@pytest.mark.parametrize(("settings", "message"), [({"sparsity": 1.0}, "sparsity=1.0"), ({"pattern": "2:7"}, "2:7")])
def test_refusals(settings, message):
    with pytest.raises(UserError, match=message):
        magnitude(jnp.asarray(W), None, Quantize(**settings))
