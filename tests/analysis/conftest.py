"""A suite of tiny runs by a real sweep: four sizes of two families, a QuantLM of each, one arm of the schedule."""

from pathlib import Path

import pytest
from helpers import TINY, arguments, data, spectra

SWEEP = """
from spectra_jax import config

def get_sweep():
    rows = []
    for D in (16, 32, 48, 64):
        for family, weight in (("FloatLM", "float"), ("TriLM", "ternary")):
            c = config.default()
            c.family, c.model.weight = family, weight
            c.model.D, c.model.F = D, 2 * D
            if weight == "ternary":
                c.schedule.shape = "linear"
                c.schedule.lower_peak = c.schedule.remove_decay = True
                c.schedule.lowered_peak = 0.005
            rows.append((f"{family.lower()}-{D}", c))
        q = config.default()
        q.family, q.quantize.method, q.quantize.group = "QuantLM", "rtn", 16
        rows.append((f"quantlm-{D}", q, f"floatlm-{D}"))
    c = config.default()
    c.family, c.model.weight, c.schedule.shape, c.model.D, c.model.F = "TriLM", "ternary", "linear", 32, 64
    rows.append(("trilm-32-neither", c))
    return rows
"""


@pytest.fixture(scope="session")
def suite(tmp_path_factory) -> Path:
    """The workdir of the finished sweep; the first checkpoint but one is kept of every run."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "sweep.py").write_text(SWEEP)
    # What the rows differ in is not overridden.
    overrides = [text for text in TINY if not text.startswith(("model.D=", "model.F="))]
    fewer = ["train.steps=6", "checkpoint.permanent_tokens=256", "checkpoint.every_steps=6", "evaluate.every_steps=6"]
    # In a process with one device: programs for eight take several times as long to compile.
    done = spectra(
        f"--sweep={folder / 'sweep.py'}", f"--workdir={folder / 'runs'}", f"--config.data.sets={data()}",
        *arguments([*overrides, *fewer]), module="spectra_jax.sweep",
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs"
