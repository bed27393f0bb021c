"""The speed benchmark, run as people run it: both frameworks must compute the same losses."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

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
