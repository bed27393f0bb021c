"""Products whose codes cross devices: the bits of the plain path forward, its gradients backward, and what crosses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drawn, on_mesh, tiny

from spectra_jax.model.parameters import graphdef_of, init_parameters
from spectra_jax.stored import abstract
from spectra_jax.train.objective import batch_loss

WEIGHTS = {
    "ternary": ("model.weight=ternary", "model.scale_shards=2"), "binary": ("model.weight=binary",),
    "bitnet158": ("model.weight=bitnet158",),
}


def loss_and_gradient(mesh_shape, *overrides):
    """Of a drawn model on a mesh; and the compiled program."""
    config, mesh = on_mesh(tiny("model.K=4", *overrides), 1, *mesh_shape)
    tokens = np.random.default_rng(0).integers(0, config.model.V, (8, config.data.T + 1)).astype(np.int32)
    graphdef = graphdef_of(config.model)
    with jax.set_mesh(mesh):
        like = abstract(jax.eval_shape(lambda: init_parameters(config.model, jax.random.key(0))), mesh)
        parameters = jax.tree.map(lambda w, x: jax.device_put(w, x.sharding), drawn(like), like)
        run = jax.jit(jax.value_and_grad(lambda p, t: batch_loss(graphdef, p, t, 1)))
        program = run.lower(parameters, tokens).compile()
        loss, gradient = program(parameters, tokens)
        assert jax.tree.all(jax.tree.map(lambda g, p: g.sharding.spec == p.sharding.spec, gradient, parameters))
    return float(loss), jax.device_get(gradient), program.as_text()


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_same_numbers(weight, mesh):
    expected, plain, _ = loss_and_gradient(mesh, *WEIGHTS[weight], "model.gather=matrix")
    for gather, remat in (("codes", "none"), ("int8", "none"), ("codes", "full")):
        how = f"model.gather={gather}", f"model.remat={remat}"
        loss, gradient, _ = loss_and_gradient(mesh, *WEIGHTS[weight], *how)
        assert loss == expected
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7), gradient, plain)


def test_what_crosses():
    """Of a block's matrices, in bytes of an all-gather: a quarter of a byte or a byte for each weight, no float."""
    m = tiny().model
    weights = 4 * m.D * m.N * m.H + 3 * m.D * m.F
    for gather, name, share in (("codes", "u8", 4), ("int8", "s8", 1)):
        for remat in ("none", "full"):
            text = loss_and_gradient(
                (8, 1), "model.weight=ternary", f"model.remat={remat}", f"model.gather={gather}"
            )[2]
            shapes = re.findall(rf" {name}\[([\d,]+)\]\S* all-gather\(", text)
            moved = [np.prod([int(d) for d in dims.split(",")]) for dims in shapes]
            assert sum(moved) == 2 * weights // share, "once forward, once backward"


def test_inputs_that_are_no_multiple_of_four_go_as_bytes():
    """36 inputs on 2 devices are 18 each: no whole bytes of four."""
    shape = ("model.D=36", "model.N=2", "model.K=2", "model.H=18", "model.weight=ternary")
    expected, *_ = loss_and_gradient((2, 1), *shape, "model.gather=matrix")
    loss, _, text = loss_and_gradient((2, 1), *shape)
    assert loss == expected and re.search(r" s8\[\S* all-gather\(", text) and re.search(r" u8\[\S* all-gather\(", text)


def test_without_a_mesh_nothing_changes():
    config = tiny("model.weight=ternary")
    graphdef = graphdef_of(config.model)
    parameters = drawn(jax.eval_shape(lambda: init_parameters(config.model, jax.random.key(0))))
    tokens = jnp.zeros((2, config.data.T + 1), jnp.int32)
    assert "u8" not in jax.jit(lambda p: batch_loss(graphdef, p, tokens, 1)).lower(parameters).as_text()
