"""The benchmark of every system's step: a row for each that is trained, the first in one as its own measure."""

import subprocess
import sys

from helpers import ROOT, TINY, arguments, data, environment, trained

SCRIPT = ROOT / "benchmarks" / "rivals.py"
SWEEP = """
from spectra_jax import config


def get_sweep():
    plain, taught, quantized = (config.default() for _ in range(3))
    taught.update({{"train": {{"start": "{run}"}}, "distill": {{"teacher": "{run}"}}}})
    quantized.quantize.method = "gptq"
    return [("plain", plain), ("taught", taught), ("quantized", quantized, "plain")]
"""


def test_a_row_for_each_that_is_trained(tmp_path):
    sweep = tmp_path / "sweep.py"
    sweep.write_text(SWEEP.format(run=trained()))
    command = [sys.executable, SCRIPT, sweep, "--rounds=2", "--steps=1", f"--config.data.sets={data()}",
               *arguments(TINY)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {name: values for name, *values in ([cell.strip() for cell in line.strip("|").split("|")]
                                               for line in done.stdout.splitlines()[2:])}
    assert list(rows) == ["plain", "taught"]
    assert rows["plain"] == ["1.00", "1.00 to 1.00", "1.00", "1.00"]
    _, _, operations, memory = rows["taught"]
    # The teacher's forward pass beside the student's and its gradient: a third more, and a teacher's weights beside
    # weights, gradients' place and two moments.
    assert 1.2 < float(operations) < 1.6 and 1.05 < float(memory) < 1.6
