"""Peaks: the table against published chip totals, the CPU against an independent measurement."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectra_jax import hardware


@pytest.mark.parametrize(
    ("kind", "cores_per_device", "devices_per_chip", "chip_teraflops"),
    [  # device kinds and cores as `jax.experimental.topologies` shows them through libtpu
        ("TPU v2", 1, 2, 45),
        ("TPU v3", 1, 2, 123),
        ("TPU v4", 1, 2, 275),
        ("TPU v4", 2, 1, 275),  # megacore: one device drives both cores
        ("TPU v5 lite", 1, 1, 197),
        ("TPU v5", 2, 1, 459),
        ("TPU v6 lite", 1, 1, 918),
        ("TPU7x", 1, 2, 2307),
        ("Tesla V100-SXM2-16GB", 1, 1, 125),
        ("Tesla V100-PCIE-16GB", 1, 1, 112),
        ("NVIDIA A100-SXM4-80GB", 1, 1, 312),
        ("NVIDIA H100 80GB HBM3", 1, 1, 989),
        ("NVIDIA H100 PCIe", 1, 1, 756),
        ("NVIDIA H200", 1, 1, 989),
        ("NVIDIA B200", 1, 1, 2250),
        ("AMD Instinct MI300X", 1, 1, 1307),
    ],
)
def test_devices_of_a_chip_add_up_to_the_chip(
    kind, cores_per_device, devices_per_chip, chip_teraflops
):
    peak = hardware.table_peak(kind, cores_per_device)
    assert peak.value * devices_per_chip == pytest.approx(chip_teraflops * 1e12)
    assert kind in peak.source


@pytest.mark.parametrize("kind", ["NVIDIA H20", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v99", ""])
def test_an_unknown_chip_has_no_peak_and_says_so(kind):
    peak = hardware.table_peak(kind)
    assert peak.value is None
    assert repr(kind) in peak.source


def test_the_cpu_peak_is_measured_near_what_numpy_reaches():
    device = jax.devices("cpu")[0]
    begin = time.perf_counter()
    peak = hardware.peak_flops(device, jnp.float32)
    assert time.perf_counter() - begin < 5  # about one second alone; the machine may be shared
    assert peak.source.startswith("measured on this CPU")
    x = np.ones((1024, 1024), np.float32)
    best = min(_seconds(lambda: x @ x) for _ in range(50))
    # BLAS and XLA differ, and neighbours disturb; a wrong FLOP count or clock is off by more.
    assert 1 / 5 < peak.value / (2 * 1024**3 / best) < 5
    assert hardware.peak_flops(device, "float32") is peak  # the second call measures nothing


def _seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def test_measuring_leaves_the_callers_mesh_alone():
    hardware._measured.cache_clear()
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        assert hardware.peak_flops(jax.devices()[0], jnp.float32).value > 0
        assert jax.sharding.get_mesh() == mesh


def test_cpu_devices_of_one_process_share_its_cores():
    devices = jax.devices("cpu")
    one = hardware.peak_flops(devices[0], jnp.float32)
    assert hardware.total_peak(devices, jnp.float32).value == one.value
    assert hardware.total_peak([]).value is None


def test_flops_per_token_against_a_count_of_every_matmul():
    L, D, F, N, H, V, T = 3, 32, 80, 4, 8, 100, 16
    forward = 0  # multiply-adds x 2 for one sequence of T tokens
    for _ in range(L):
        forward += 3 * 2 * T * D * N * H + 2 * T * N * H * D  # q, k, v; o
        forward += 2 * N * T * T * H + 2 * N * T * T * H  # scores; values
        forward += 3 * 2 * T * D * F  # gate, up, down
    forward += 2 * T * D * V
    matmul_params = L * (4 * D * N * H + 3 * D * F) + D * V
    # The backward pass multiplies twice per forward product: by the weights and by the inputs.
    counted = hardware.flops_per_token(matmul_params=matmul_params, L=L, N=N, H=H, T=T)
    assert counted * T == 3 * forward


def test_mfu_is_a_fraction_or_unknown():
    assert hardware.mfu(1000.0, 6e9, 2e13) == pytest.approx(0.3)
    assert hardware.mfu(1000.0, 6e9, None) is None
