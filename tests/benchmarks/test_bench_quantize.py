"""The benchmark of GPTQ runs, and its two solvers reach the same error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quantize.py"


@pytest.mark.slow
def test_same_error_as_the_published_loop():
    command = [sys.executable, SCRIPT, "--sizes=99m", "--rounds=1"]
    done = subprocess.run(command, env=environment(quick=False), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [(row["peer"], row["in"], row["out"]) for row in rows] == [
        (peer, m, n) for m, n in ((512, 512), (512, 1280), (1280, 512)) for peer in ("ours", "torch")
    ]
    for mine, theirs in zip(rows[::2], rows[1::2]):
        assert mine["error"] == pytest.approx(theirs["error"], rel=1e-3) and 0.01 < mine["error"] < 0.2
        assert mine["seconds"] > 0 and theirs["ratio"] == theirs["seconds"] / mine["seconds"]
