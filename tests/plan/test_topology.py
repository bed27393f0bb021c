"""Slices by name, and their devices from libtpu."""

import jax
import pytest
from helpers import tiny

from spectra_jax.errors import UserError
from spectra_jax.plan import topology
from spectra_jax.sharding import make_mesh


@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [("v4:2x2x2", "TPU v4", 8), ("v5e-16", "TPU v5 lite", 16), ("v5p:4x4x4", "TPU v5", 64),
     ("v6e:4x4", "TPU v6 lite", 16), ("tpu7x:2x2x2", "TPU7x", 16), ("v5e:2x4*2", "TPU v5 lite", 16)],
)
def test_devices(name, kind, devices):
    """As many as the topology says, of the kind and the cores that the table has."""
    there = topology.parse(name)
    found = topology.devices(there)
    assert len(found) == devices == there.devices
    assert {device.device_kind for device in found} == {kind} == {there.family.kind}
    assert found[0].num_cores == there.family.cores


@pytest.mark.parametrize("name", ["v5litepod:4x4", "v5p", "v5e:4y4", "v5e:4x4*0", "v5e:4x4*", "h1000:8"])
def test_unknown_names(name):
    with pytest.raises(UserError, match="is not known: give FAMILY:AxB.xC. with a TPU of v4, v5e, v5p, v6e"):
        topology.parse(name)


def test_sides_and_slices_that_are_not():
    with pytest.raises(UserError, match="a slice of v5p has 3 sides"):
        topology.parse("v5p:4x4")
    with pytest.raises(UserError, match="a node has a number of GPUs"):
        topology.parse("h100:8x8")
    with pytest.raises(UserError, match="libtpu has no such slice"):
        topology.devices(topology.parse("v5e:3x5"))


def test_slices_are_on_their_axis():
    two = topology.devices(topology.parse("v5e:2x2*2"))
    mesh = make_mesh(tiny("mesh.slice=2"), two)
    assert mesh.shape == {"slice": 2, "data": 4, "model": 1}
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="are in 2 slices and config.mesh.slice=1; use --config.mesh.slice=2"):
        make_mesh(tiny(), two)


def test_neighbours_in_the_mesh_are_neighbours_on_the_torus():
    """The ring of 16 chips steps to an adjacent one each time; the order in which libtpu lists them does not."""
    def steps(devices: list[jax.Device]) -> set[int]:
        return {sum(abs(a - b) for a, b in zip(x.coords, y.coords)) for x, y in zip(devices, devices[1:] + devices[:1])}

    listed = topology.devices(topology.parse("v5e:4x4"))
    mesh = make_mesh(tiny("data.batch=16"), listed)
    assert steps(list(mesh.devices.flat)) == {1} != steps(listed)
