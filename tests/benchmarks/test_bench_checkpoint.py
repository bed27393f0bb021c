"""The benchmark of checksums runs, and a restore takes the memory of the state and little more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "checkpoint.py"


@pytest.mark.slow
def test_memory_of_a_restore():
    command = [sys.executable, SCRIPT, "--mib=768", "--rounds=1"]
    done = subprocess.run(command, env=environment(quick=False), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Arrays on their way, the storage layer's cache of 100 MB, libraries: 1.38 seen alone, 1.54 beside other work.
    assert 1 <= found["peak / state"] < 1 + found["largest array / state"] + 450 / found["mib"]
