"""Searching for a plan: the estimate of memory beside what libtpu assigned, the ranking, and what fits nowhere."""

import re

import pytest

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.plan import estimate, topology
from spectra_jax.plan.report import searched
from spectra_jax.plan.search import SPARE, search


@pytest.mark.parametrize(
    ("size", "devices", "batch", "remat", "gib"),
    # `spectra plan --compile` with attention=splash, libtpu 0.0.42.1, 2026-11-22: v5e:2x4, v5e:4x4 and v5p:4x4x4
    [("390m", 8, 64, "full", 2.43), ("390m", 8, 384, "full", 11.34), ("390m", 8, 544, "full", 15.56),
     ("390m", 8, 64, "dots", 9.21), ("390m", 8, 32, "none", 15.28), ("99m", 8, 64, "none", 10.23),
     ("1.1b", 16, 64, "full", 2.74), ("3.9b", 64, 256, "full", 3.96)],
)
def test_the_estimate_beside_the_compiler(size, devices, batch, remat, gib):
    config = configs.load(f"configs/trilm.py:{size}", (f"data.batch={batch}", f"model.remat={remat}"))
    assert estimate.peak(config, (1, devices, 1)) / 2**30 == pytest.approx(gib, rel=0.12)


def test_what_is_found_fits_and_is_ranked():
    config, there = configs.load("configs/trilm.py:3.9b"), topology.parse("v5e-16")
    found = search(config, there)
    speeds = [one.bound.tokens_per_second for one in found]
    assert max(speeds) <= 1.03 * speeds[0] and speeds[-1] < 0.9 * speeds[0]
    assert all(one.memory <= SPARE * 15.75 * 2**30 for one in found)
    assert {one.config.data.batch for one in found} == {528}, "which 16 devices divide, as the config has it"
    # The changes said are all that differs.
    again = configs.override(config, [change.removeprefix("--config.") for change in found[0].changes])
    assert again == found[0].config


def test_a_batch_that_does_not_divide_gives_way():
    found = search(configs.load("configs/trilm.py:3.9b"), topology.parse("v5p-128"))
    assert {one.config.data.batch for one in found if one.shape[2] == 1} == {512}


def test_slices_hold_replicas():
    found = search(configs.load("configs/trilm.py:99m"), topology.parse("v5e:4x4*2"))
    assert {one.shape[0] for one in found} == {2} and found[0].bound.network > 0


def test_the_text_has_the_plan_of_the_best():
    text = searched(configs.load("configs/trilm.py:390m"), ["v5e:2x4", "h100:8"])
    assert len(re.findall(r"^  changes    --config.mesh.data=8", text, re.MULTILINE)) == 2
    assert text.count("lowered    in") == 2 and "attention cudnn" in text and "attention splash" in text


def test_a_model_that_fits_in_no_way():
    config = configs.load("configs/trilm.py:3.9b", ("model.L=400",))
    with pytest.raises(UserError, match=r"in no way on v5e:2x2: the least is about \d+\.\d GiB .* at least \d+ chips"):
        search(config, topology.parse("v5e:2x2"))
