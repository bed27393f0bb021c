"""The bound against a derivation by hand."""

import pytest

from spectra_jax import config as configs
from spectra_jax.plan import topology
from spectra_jax.plan.roofline import bound
from spectra_jax.sharding import abstract_mesh


def of(spec, name, *overrides):
    config, there = configs.load(spec, overrides), topology.parse(name)
    return bound(config, abstract_mesh(config, there.devices), there)


def test_a_paper_scale_step():
    """3.9B on 64 v5p, 4 sequences a chip, everything computed again: heads of 128 fill the matrix unit."""
    found = of("configs/trilm.py:3.9b", "v5p:4x4x4", "data.batch=256", "model.remat=full")
    D, F, L, V, T, tokens = 3072, 9216, 30, 50688, 2048, 256 * 2048
    blocks = L * (4 * D * D + 3 * D * F)
    attention = 2 * L * D * T  # a token's two products with half a row
    done = (8 * blocks + 6 * V * D + 4 * attention) * tokens
    assert found.compute == pytest.approx(done / 64 / (0.85 * 459e12), rel=1e-9)
    assert found.limit == "compute" and found.network == 0
    useful = (6 * blocks + 6 * V * D + 3 * attention) * tokens
    assert found.mfu == pytest.approx(useful / found.compute / 64 / 459e12, rel=1e-9)
    assert found.days(300_000_000_000) == pytest.approx(300e9 / (tokens / found.compute) / 86400, rel=1e-9)


def test_what_crosses_links_and_slices():
    """A block weight crosses at 2 bits twice and comes back in 2 bytes, the head's in 2 and 4; rows cross twice."""
    one = of("configs/trilm.py:99m", "v5e:4x4", "data.batch=16")
    blocks, table = 16 * (4 * 512 * 512 + 3 * 512 * 1280), 50304 * 512
    crossing = (blocks * (2 * 0.25 + 2) + table * 6 + 2 * 2048 * 512 * 2) * 15 / 16
    assert one.links == pytest.approx(crossing / (2 * 4.5e10 * 2), rel=1e-9)
    matrix = of("configs/trilm.py:99m", "v5e:4x4", "data.batch=16", "model.gather=matrix")
    assert matrix.links - one.links == pytest.approx(blocks * 2 * 1.75 * 15 / 16 / (2 * 4.5e10 * 2), rel=1e-9)
    two = of("configs/trilm.py:99m", "v5e:4x4*2", "data.batch=32", "mesh.slice=2")
    assert two.links == pytest.approx(one.links, rel=1e-9)
    assert two.network == pytest.approx((blocks + 2 * table) / 16 * 2 / 3.1e9, rel=1e-9)


def test_narrow_heads_cost_more_of_attention_only():
    """Heads of 64 fill half of a matrix unit of 128."""
    found = of("configs/trilm.py:99m", "v5e:4x4", "data.batch=16")
    blocks, head = 16 * (4 * 512 * 512 + 3 * 512 * 1280), 50304 * 512
    done = (6 * (blocks + head) + 3 * 2 * (2 * 16 * 512 * 2048)) * 16 * 2048
    assert found.compute == pytest.approx(done / 16 / (0.85 * 197e12), rel=1e-9)


def test_nodes_of_gpus():
    """Weights that 16 GPUs share come to a node of 8 once, by all of its adapters; replicas are another's business."""
    shared = of("configs/trilm.py:99m", "h100:8*2", "data.batch=16")
    blocks, table = 16 * (4 * 512 * 512 + 3 * 512 * 1280), 50304 * 512
    crossing, rows = blocks * (2 * 0.25 + 2) + table * 6, 2 * 2048 * 512 * 2
    assert shared.links == pytest.approx((crossing + rows) * 15 / 16 / 450e9, rel=1e-9)
    assert shared.network == pytest.approx((crossing / 8 + rows) / 2 / 50e9, rel=1e-9)
    apart = of("configs/trilm.py:99m", "h100:8*2", "data.batch=16", "mesh.slice=2")
    assert apart.links == pytest.approx((crossing + rows) * 7 / 8 / 450e9, rel=1e-9)
    assert apart.network == pytest.approx((blocks + 2 * table) / 8 * 2 / 50e9, rel=1e-9)
