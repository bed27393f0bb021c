"""The mesh of a run, what does not fit on it, and the table from logical dims to mesh axes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spectra_jax import sharding
from spectra_jax.errors import UserError
from spectra_jax.schema import Config, Data, Mesh, Model, Train
from spectra_jax.sharding import Rules, mesh_shape


def run(mesh=Mesh(), batch=8, accumulate=1, **model) -> Config:
    """A small config that fits on any mesh of 8 devices."""
    shape = {"V": 64, "D": 32, "F": 48, "L": 1, "N": 8, "K": 8, "H": 4} | model
    return Config(
        model=Model(**shape),
        data=Data(T=8, batch=batch),
        train=Train(accumulate=accumulate, loss_chunks=1),
        mesh=mesh,
    )


@pytest.mark.parametrize(
    ("wanted", "devices", "shape"),
    [
        (Mesh(), 8, (1, 8, 1)),
        (Mesh(), 1, (1, 1, 1)),
        (Mesh(model=2), 8, (1, 4, 2)),
        (Mesh(slice=2, model=2), 8, (2, 2, 2)),
        (Mesh(slice=-1, data=4), 8, (2, 4, 1)),
        (Mesh(slice=1, data=2, model=-1), 8, (1, 2, 4)),
        (Mesh(slice=1, data=4, model=2), 8, (1, 4, 2)),
        (Mesh(data=-1, model=3), 6, (1, 2, 3)),
    ],
)
def test_mesh_shape(wanted, devices, shape):
    assert mesh_shape(wanted, devices) == shape


@pytest.mark.parametrize(
    ("wanted", "devices", "message"),
    [
        (Mesh(model=3), 8, "model=3: the axes do not make up 8 devices; use divisors of it, [1, 2, 4, 8]"),
        (Mesh(data=3), 8, "data=3, model=1: the axes do not make up 8 devices"),
        (Mesh(data=2, model=2), 8, "slice=1, data=2, model=2: the axes do not make up 8"),
        (Mesh(data=16), 8, "data=16, model=1: the axes do not make up 8 devices"),
        (Mesh(data=-1, model=-1), 8, "only one may be -1"),
        (Mesh(data=0), 8, "each must be at least 1"),
        (Mesh(model=-2), 8, "each must be at least 1"),
    ],
)
def test_meshes_that_do_not_fit(wanted, devices, message):
    with pytest.raises(UserError, match=re.escape(message)):
        mesh_shape(wanted, devices)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            run(batch=12),
            "batch=12 in 1 microbatches of 12 is not divisible by the data axes (1 x 8); use 16",
        ),
        (run(Mesh(2, 4, 1), batch=12), "is not divisible by the data axes (2 x 4); use 16"),
        (
            run(batch=16, accumulate=4),
            "batch=16 in 4 microbatches of 4 is not divisible by the data axes (1 x 8); use 32",
        ),
        (run(D=36), "config.model.D=36 is not divisible by the data axis (8)"),
        (run(Mesh(model=4), N=6, K=6), "config.model.N=6 is not divisible by the model axis (4)"),
        (run(Mesh(model=4), K=2), "config.model.K=2 is not divisible by the model axis (4)"),
        (run(Mesh(model=4), F=50), "config.model.F=50 is not divisible by the model axis (4)"),
        (run(Mesh(model=4), V=50), "config.model.V=50 is not divisible by the model axis (4)"),
    ],
)
def test_runs_that_do_not_fit_on_their_mesh(config, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        sharding.make_mesh(config)
    if suggestion := re.search(r"use (\d+) or", str(error.value)):  # the advice has to work
        data = dataclasses.replace(config.data, batch=int(suggestion[1]))
        sharding.make_mesh(dataclasses.replace(config, data=data))


def test_make_mesh():
    mesh = sharding.make_mesh(run(Mesh(2, 2, 2)))
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "model": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())
    one = sharding.make_mesh(run(), devices=jax.devices()[:1])
    assert one.devices.shape == (1, 1, 1)


def test_rules():
    assert Rules()("vocab", "embed") is None  # outside a mesh
    with jax.set_mesh(sharding.make_mesh(run(Mesh(2, 2, 2)))):
        assert Rules()("vocab", "embed") == P("model", "data")
        assert Rules()("embed", "heads") == P("data", "model")
        assert Rules()("batch", "time", "act") == P(("slice", "data"), None, None)
        assert Rules()("batch", "time", "vocab") == P(("slice", "data"), None, "model")
        assert Rules()("vocab", None) == P("model", None)
        assert Rules(embed=None)("embed", "ffn") == P(None, "model")


def test_without():
    """A batch off the axes of D keeps the others, in their order; what shares none stays as it is."""
    assert Rules().without("batch", "embed").batch == ("slice",)
    assert Rules(embed=None).without("batch", "embed").batch == ("slice", "data")
    assert Rules(batch="data").without("batch", "embed").batch == ()
    assert Rules().without("batch", "embed").embed == "data"


@pytest.mark.parametrize(
    ("rules", "dims"),
    [
        (Rules(), ("heads", "ffn")),
        (Rules(), ("batch", "embed")),  # "data" inside a tuple of axes
        (Rules(embed="model"), ("embed", "heads")),
        (Rules(time="data"), ("batch", "time", "act")),
        (Rules(batch=("slice", "model")), ("batch", "time", "vocab")),
    ],
)
def test_two_dims_on_one_axis_are_refused(rules, dims):
    with pytest.raises(ValueError, match="an axis can shard one dim of an array only"):
        rules(*dims)


def test_an_unknown_dim_is_refused():
    with pytest.raises(AttributeError, match="embedd"):
        Rules()("embedd")


def test_gathered():
    x = jnp.arange(32.0).reshape(8, 4)
    assert sharding.gathered(x) is x and not sharding.in_mesh()
    mesh = sharding.make_mesh(run(Mesh(2, 2, 2)))
    with jax.set_mesh(mesh):
        assert sharding.in_mesh()
        spread = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
        whole = jax.jit(sharding.gathered)(spread)
        assert whole.sharding.is_fully_replicated
        moved = jax.jit(lambda a: sharding.gathered(a, P(None, "model")))(spread)
        assert moved.sharding.spec == P(None, "model")
        for y in (whole, moved):
            np.testing.assert_array_equal(y, x)


def test_batch_sharding():
    mesh = sharding.make_mesh(run(Mesh(2, 2, 2)))
    spread = sharding.batch_sharding(mesh)
    assert spread.spec == P(("slice", "data"), None)
    assert spread.shard_shape((8, 9)) == (2, 9)
