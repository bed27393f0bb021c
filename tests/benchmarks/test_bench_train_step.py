"""The speed benchmark, run as people run it: both frameworks must compute the same losses."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import torch

from spectra_jax.errors import UserError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("train_step_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torch_and_ours_have_equal_losses():
    command = [
        sys.executable, SCRIPT, "--shape=D32 F80 L2 N2 V96 B2 T32", "--steps=1", "--rounds=1",
        "--contenders=torch-eager,float", "--config.model.attention_blocks=2",
        "--config.train.loss_chunks=2", "--config.optimizer.clip=0.5",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    torch, ours = (result["contenders"][name] for name in ("torch-eager", "float"))
    assert torch["losses"] == pytest.approx(ours["losses"], abs=5e-5, rel=0)
    assert ours["losses"][-1] < ours["losses"][0] - 0.05  # it learns: updates were compared, too
    assert result["baseline"] == "torch-eager" and torch["speed_ratio"] == 1
    assert 0 < ours["fraction_of_peak"] < 1
    for contender in (torch, ours):
        assert 50e6 < contender["memory_bytes"] < 5e9


@pytest.mark.slow
def test_several_shapes_in_the_precision_of_gpus():
    """What a GPU would run, on a CPU: bfloat16, a scan with remat, and one table for the log."""
    shapes = ["D32 F80 L2 N2 V96 B2 T32", "D48 F80 L2 N2 V96 B2 T16"]
    command = [
        sys.executable, SCRIPT, *(f"--shape={shape}" for shape in shapes), "--steps=1", "--rounds=1",
        "--contenders=torch-eager,float", "--remat=dots", "--config.model.compute_dtype=bfloat16",
        "--config.model.attention=cudnn", "--config.optimizer.clip=0.5",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    assert [result["config"]["model"]["D"] for result in results] == [32, 48]
    assert results[0]["config"]["model"]["remat"] == "dots"
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| D")]
    assert [row[:2] for row in rows] == [[f"| {s}", name] for s in shapes for name in ("torch-eager", "float")]
    for result, row in zip(results, rows[1::2]):
        ours = result["contenders"]["float"]
        assert row[2] == f"{ours['tokens_per_second']:,.0f}"
        assert row[4] == f"{ours['speed_ratio']:.2f} ({ours['speed_ratio']:.2f}-{ours['speed_ratio']:.2f})"
        assert 0 < result["loss_spread"] < 2e-2 and ours["losses"][-1] < ours["losses"][0]
    assert "bfloat16, attention cudnn" in done.stdout and "--remat=dots" in done.stdout


def test_without_a_gpu(script):
    """It says who has none; where JAX has one and PyTorch has not, ours run alone."""
    contender = sys.modules["contender"]
    config = script.make_config(script.QUICK, "gpu")
    assert (config.model.attention, config.model.compute_dtype) == ("cudnn", "bfloat16")
    for name, framework, there in (
        ("torch-eager", "PyTorch", torch.cuda.is_available()), ("float", "JAX", jax.default_backend() == "gpu"),
    ):
        with contender.Contender(name, config, "gpu", folder="") as process:
            if not there:
                assert process.receive()["absent"].startswith(framework)
    facts = {"flops_per_token": 1000, "absent": {"torch-compile": "PyTorch sees no GPU"}}
    seen = {
        name: {
            "losses": [1.0], "compile_seconds": 2.0, "step_seconds": [0.5 * k], "memory_bytes": 2**30 * k,
            "peak_flops": 1e9, "device": "NVIDIA H200", "software": "jax 0.10.2 (cuda 12090)",
        }
        for k, name in enumerate(("float", "tri"), 1)
    }
    where = script.origin() | dict(device="gpu", remat="none", attention="cudnn", dtype="bfloat16", steps=10, rounds=5)
    entry = script.log_entry({"quick": facts | script.summarise(facts, seen, config)}, where)
    assert "a training step on NVIDIA H200\n" in entry
    assert "Not measured: torch-compile: PyTorch sees no GPU." in entry
    assert "| quick | float | 256 | 0.0% | 1.00 (1.00-1.00) | - | 1.0 GiB |" in entry
    assert "| quick | tri | 128 | 0.0% | 0.50 (0.50-0.50) | 2.000 | 2.0 GiB |" in entry


def test_different_losses_are_found(script):
    same = {"torch-eager": {"losses": [2.0, 1.0]}, "float": {"losses": [2.0, 1.0]}}
    assert script.loss_spread(same | {"tri": {"losses": [3.0, 3.0]}}) == 0
    apart = same | {"float-remat": {"losses": [2.0, 1.0001]}}
    assert script.loss_spread(apart) > script.TOLERANCE["float32"]
    broken = same | {"float-remat": {"losses": [2.0, float("nan")]}}
    assert not script.loss_spread(broken) <= script.TOLERANCE["bfloat16"]


def test_ratios_are_medians_within_rounds(script):
    def seen(*seconds: float) -> dict:
        return {
            "losses": [1.0], "compile_seconds": 2.0, "step_seconds": list(seconds),
            "memory_bytes": 100, "peak_flops": 1e6,
        }

    config = script.make_config("D32 F80 L2 N2 V96 B2 T32", "cpu")
    contenders = {
        "torch-compile": seen(1.0, 10.0, 1.0),
        "float": seen(2.0, 10.0, 0.5),
        "tri": seen(2.2, 11.0, 0.5),
    }
    result = script.summarise({"flops_per_token": 1000}, contenders, config)
    assert result["contenders"]["float"]["speed_ratio"] == 1.0  # of 0.5, 1 and 2
    assert result["tri_to_float_step_time"] == {"tri": pytest.approx(1.1)}
    assert result["bound_step_seconds"] == pytest.approx(1000 * 64 / 1e6)


def test_shapes(script):
    m = script.make_config("99m B4 T1024", "gpu")
    assert (m.model.D, m.model.L, m.model.V, m.model.H) == (512, 16, 50304, 64)
    assert (m.data.batch, m.data.T, m.model.compute_dtype) == (4, 1024, "bfloat16")
    with pytest.raises(UserError, match="'X3' is neither"):
        script.make_config("X3", "cpu")
    with pytest.raises(UserError, match="D=30 is not divisible by N=4"):
        script.make_config("D30", "cpu")
