"""kill -9 at random moments: the fault benchmark, as people run it, with fewer kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_ten_kills_change_no_bit():
    command = [sys.executable, SCRIPT, "--kills=10", "--steps=100"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["kills"], found["different"]) == (10, 0)
    assert found["before_a_new_step"] < 10, "some must have died while they trained"
