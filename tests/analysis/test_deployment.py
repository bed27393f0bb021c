"""Arithmetic of deployment against the facts of the paper, numbers worked out by hand, and the project's own tables."""

import pytest

from spectra_jax import hardware
from spectra_jax.analysis import accelerators, deployment, plots
from spectra_jax.errors import UserError
from spectra_jax.plan.topology import FAMILIES
from spectra_jax.schema import Model


def test_memory_and_speed_of_the_llama_shapes():
    """GB at 16, 4.25 and 1.58 bits, and how much faster 4 and 1.58 bits are."""
    facts = {
        "7B": (15.1, 5.5, 3.4, 2.82, 4.45), "13B": (28.0, 9.4, 5.1, 3.12, 5.46), "34B": (70.6, 21.9, 10.8, 3.39, 6.56),
        "70B": (141.1, 40.6, 17.7, 3.67, 7.96),
    }
    table = deployment.table().set_index(["shape", "family"])
    for shape, (full, grouped, ternary, four, faster) in facts.items():
        assert table.loc[(shape, "FloatLM"), "total"] == pytest.approx(full, abs=0.05)
        found = deployment.memory(deployment.shape_of(shape), deployment.GROUPED_4_BIT)["total"]
        assert found == pytest.approx(grouped, abs=0.05)
        assert table.loc[(shape, "TriLM"), "total"] == pytest.approx(ternary, abs=0.05)
        assert table.loc[(shape, "QuantLM 4-bit"), "speedup"] == pytest.approx(four, abs=0.005)
        assert table.loc[(shape, "TriLM"), "speedup"] == pytest.approx(faster, abs=0.006)


@pytest.mark.parametrize(("name", "size"), [("180B", 180e9), ("300B", 300e9), ("340B", 340e9)])
def test_assumed_shapes_are_as_large_as_they_say(name, size):
    shape = deployment.shape_of(name)
    assert shape.parameters.total == pytest.approx(size, rel=0.005) and shape.source == "assumed"
    assert shape.F == 3.5 * shape.D and shape.N * shape.H == shape.D


def test_the_cache_by_hand():
    """Llama 2 70B, 8 heads of 128: 320 KiB a token in 16 bits."""
    found = deployment.memory(deployment.shape_of("70B"), 4, context=4096, sequences=2, cache_bits=8)
    assert found["cache"] == pytest.approx(80 * 2 * 8 * 128 * 4096 * 2 / 1e9)
    assert found["total"] == pytest.approx(found["blocks"] + found["embedding"] + found["cache"])


def test_a_shape_of_a_config():
    m = Model(D=64, F=128, L=2, N=4, K=2, H=16, V=1000, tie_embeddings=True)
    found = deployment.memory(deployment.Shape.of("tiny", m), 2, embedding_bits=8)
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert found["blocks"] == pytest.approx(linear * 2 / 8 / 1e9)
    assert found["embedding"] == pytest.approx((64_000 + 2 * 5 * 64) / 1e9)


def test_claims_of_the_paper():
    """All follow but one: twice the speed of 4 bits at 7B."""
    table = deployment.claims()
    assert list(table[~table["follows"]]["computed"]) == ["1.58x", "1.64x"]
    assert all("2 times as fast as 4 bits" in text or "4.25" in text for text in table[~table["follows"]]["claim"])
    assert len(table) >= 10


def test_what_fits():
    models = deployment.table([deployment.shape_of("70B")])
    table = deployment.fits(models, ["H100 SXM", "TPU v5e"]).set_index(["device", "family"])
    assert list(table["devices"]) == [2, 1, 1, 9, 3, 2]
    full = table.loc[("H100 SXM", "FloatLM")]
    assert full["left"] == pytest.approx(160 - 141.1, abs=0.1)
    assert full["decode"] == pytest.approx(2 * 3350 / 141.1, rel=1e-3)


def test_the_largest_that_fits():
    assert deployment.largest("H100 SXM", 1.58) > 300e9 > deployment.largest("H100 SXM", 16.0, count=4)
    for bits, count in ((16.0, 1), (4.25, 1), (1.58, 8)):
        found = deployment.largest("MI300X", bits, count=count)
        assert 0.8 < found * bits / 8 / 1e9 / (192 * count) < 1.0, "all but embedding and head, which have 16 bits"


# Devices


def test_accelerators_agree_with_what_training_and_plans_use():
    """Peaks of MFU, and bandwidth and memory of `spectra plan`, which are tables of their own for JAX's devices."""
    kinds = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "tpu7x": "TPU7x", "h100": "H100 SXM",
             "h200": "H200 SXM", "b200": "B200"}
    assert set(kinds) == set(FAMILIES)
    for name, family in FAMILIES.items():
        row = accelerators.find(kinds[name])
        assert family.flops * family.per_chip == pytest.approx(row["tflops"] * 1e12, rel=0.01)
        assert family.bandwidth * family.per_chip == pytest.approx(row["bandwidth_tbs"] * 1e12, rel=0.05)
        assert family.memory * family.per_chip * 1.0737 == pytest.approx(row["memory_gb"], rel=0.08)
    named = {
        "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB", "Tesla V100-SXM2-16GB": "V100 SXM", "AMD MI300X": "MI300X",
        "Tesla V100-PCIE-16GB": "V100 PCIe", "NVIDIA H100 PCIe": "H100 PCIe",
    }
    for kind, name in named.items():
        assert hardware.table_peak(kind).value == accelerators.find(name)["tflops"] * 1e12


def test_every_trend_falls():
    table = accelerators.trends()
    assert (table["slope"] < 0).all() and set(table["vendor"]) == {"NVIDIA", "AMD", "Intel", "Google"}
    ratios = accelerators.ratios()
    assert ratios["GB per TFLOP/s"].between(0.03, 0.40).all() and ratios["TB/s per TFLOP/s"].between(0, 0.010).all()
    intel = table[(table["vendor"] == "Intel") & (table["ratio"] == "GB per TFLOP/s")].iloc[0]
    assert intel["slope"] == pytest.approx((128 / 1835 - 96 / 432) / 2), "through two points"


def test_figures(tmp_path):
    table = deployment.table()
    memory = plots.memory(table, tmp_path / "memory.png")
    lines = {str(line.get_label()): line for line in memory.axes[0].lines}
    assert list(lines["TriLM"].get_ydata()) == list(table[table["family"] == "TriLM"]["total"])
    assert lines["TriLM"].get_color() == plots.FAMILIES["TriLM"][0]
    assert len(plots.speedup(table, tmp_path / "speed.svg").axes[0].lines) == 4
    assert "2018" in "".join(text.get_text() for text in plots.hardware(tmp_path / "hw.png").axes[1].get_xticklabels())
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("memory.png", "speed.svg", "hw.png"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accelerators.find("H1000"), r"unknown device 'H1000'; did you mean H100 SXM\?|did you mean H100"),
        (lambda: deployment.fits(deployment.table(), ["quantum"]), "unknown device 'quantum'"),
        (lambda: deployment.shape_of("8B"), "shape='8B' is not one of 7B, 13B, 34B"),
        (lambda: deployment.memory(deployment.shape_of("7B"), 0), "bits=0 of a weight must be positive"),
        (lambda: deployment.memory(deployment.shape_of("7B"), 4, context=-1), "context=-1 must not be negative"),
        (lambda: deployment.largest("TPU v5e", 16.0, count=0), "0 x TPU v5e with 0 GB hold no model"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UserError, match=message):
        call()
