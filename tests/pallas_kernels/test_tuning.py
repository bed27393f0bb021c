"""Blocks of the TPU kernel: they divide the matrix, fit, and keep the predicted time near what memory allows."""

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.tuning import GENERATIONS, blocks, seconds, vmem_bytes

CHIPS = {
    "v4": pltpu.ChipVersion.TPU_V4, "v5e": pltpu.ChipVersion.TPU_V5E, "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E, "v7x": pltpu.ChipVersion.TPU_7X,
}
TRILM = [(512, 1280), (768, 2048), (1024, 2560), (1280, 3072), (1536, 4096), (1792, 5120), (2048, 6144), (2304, 7680),
         (3072, 9216)]
LLAMA = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192)]  # of 8B and 70B
SHAPES = [shape for D, F in TRILM for shape in ((D, D), (D, F), (F, D))] + LLAMA


@pytest.mark.parametrize("generation", GENERATIONS)
def test_blocks_divide_the_matrix_and_fit(generation):
    available = pltpu.get_tpu_info_for_chip(CHIPS[generation], 1).vmem_capacity_bytes
    for m, n in SHAPES:
        for M in (1, 8, 9, 32, 128, 256, 257, 1000, 4096):
            bm, bk, bn = blocks(M, m, n, generation)
            assert m % bk == n % bn == bk % 128 == bn % 128 == bm % 8 == 0
            assert bm == -(-M // 8) * 8 if M <= 256 else bm % 128 == 0  # whole tiles of int8 and bf16 rows
            assert vmem_bytes(bm, bk, bn, generation) <= available // 2, (M, m, n)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_table_against_pallas(generation):
    """Its own numbers; clocks are assumed, so peaks agree to a fifth only, and the bandwidth of v5p is the cloud's."""
    core, info = GENERATIONS[generation], pltpu.get_tpu_info_for_chip(CHIPS[generation], 1)
    assert core.vmem == info.vmem_capacity_bytes
    assert core.bandwidth == pytest.approx(info.mem_bw_bytes_per_second, rel=0.13)
    assert (core.activations == jnp.int8) == (info.int8_ops_per_second > 0)
    peak = info.int8_ops_per_second or info.bf16_ops_per_second
    assert 2 * core.products * core.clock == pytest.approx(peak, rel=0.2)


def test_vmem_bytes_written_out():
    """Blocks 8 x 4096 x 512 on v5e, array by array."""
    twice = 16 * 4096 + 4096 * 512 // 4 + 8 * 128 * 4 + 8 * 512 * 4 + 8 * 512 * 4
    assert vmem_bytes(8, 4096, 512, "v5e") == 2 * twice + 4096 * 512 + 2 * (16 * 512 * 4) + 2**20
    assert vmem_bytes(8, 4096, 512, "v4") == vmem_bytes(8, 4096, 512, "v5e") + 2 * 16 * 4096 + 4096 * 512  # bf16


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_decode_is_predicted_near_the_speed_of_memory(generation):
    core = GENERATIONS[generation]
    for m, n in LLAMA:
        memory = m * n / 4 / core.bandwidth / core.cores
        assert memory < seconds(8, m, n, blocks(8, m, n, generation), generation) < 1.4 * memory


def test_no_blocks_are_predicted_faster():
    """All that divide a matrix of 768 x 1024 and all heights, by hand."""
    best = seconds(300, 768, 1024, blocks(300, 768, 1024, "v5e"), "v5e")
    for bm in (128, 256, 512):
        for bk in (128, 256, 384, 768):
            for bn in (128, 256, 512, 1024):
                assert seconds(300, 768, 1024, (bm, bk, bn), "v5e") >= best


def test_misfits_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 128, not \(500, 512\)"):
        blocks(8, 500, 512, "v5e")
    with pytest.raises(ValueError, match="no TPU generation 'v3'"):
        tuning.blocks(8, 512, 512, "v3")
