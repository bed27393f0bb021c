"""Packed products inside the model: the same numbers as its unpacked weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TERNARY, assert_same_logits, trained

from spectra_jax.errors import UserError
from spectra_jax.model.parameters import apply
from spectra_jax.serve.load import load
from spectra_jax.weights.prepared import prepare

FAMILIES = {
    "ternary": (*TERNARY, "model.scale_shards=2"), "binary": ("model.weight=binary",),
    "bitnet": ("model.weight=bitnet158",),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits(family):
    model = load(str(trained(*FAMILIES[family])), devices=jax.devices()[:1])
    tokens = jnp.asarray(np.random.RandomState(0).randint(0, 300, (2, 16)))
    with jax.set_mesh(model.mesh):
        packed, _ = prepare(model.parameters, "xla")
        expected, found = (apply(model.graphdef, p)(tokens) for p in (model.parameters, packed))
    assert_same_logits(found, expected, rounds=family == "bitnet", bound=1e-4)


def test_misfits_are_refused():
    with pytest.raises(UserError, match="ternary and binary models; this one has no such matrix"):
        prepare(load(str(trained())).parameters, "packed")
    model = load(str(trained(*TERNARY)), devices=jax.devices()[:1])
    with pytest.raises(UserError, match="no implementation 'cuda'; there are .*; use another"):
        prepare(model.parameters, "cuda")
