"""The benchmark of generation runs, and its numbers fit together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generate.py"


@pytest.mark.slow
def test_its_contenders():
    command = [sys.executable, SCRIPT, "--sizes=99m", "--layers=1", "--rounds=1"]
    done = subprocess.run(command, env=environment(quick=False), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["contender"] for row in rows] == ["unpacked", "packed", "packed8", "transformers", "llamacpp"]
    for row in rows:
        assert row["prefill"] > 0 and row["decode"] > 0 and 100 < row["peak MiB"] < 4000
        assert all(row[f"{name} ratio"] == row[name] / rows[0][name] for name in ("prefill", "decode", "peak MiB"))
