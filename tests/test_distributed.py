"""Start-up: what the variables must say. The processes themselves are in train/test_processes.py."""

import jax
import pytest
from helpers import spectra

from spectra_jax.distributed import VARIABLES, Vote, anywhere


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("127.0.0.1:1", "", "0"), "JAX_NUM_PROCESSES not set; several processes need all of JAX_COORDINATOR_ADDRESS"),
        (("", "2", ""), "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not set"),
        (("127.0.0.1:1", "two", "0"), "JAX_NUM_PROCESSES='two' and JAX_PROCESS_ID='0' must be numbers"),
        (("", "", ""), "JAX recognises no cluster here; set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_variables_that_do_not_make_a_cluster(monkeypatch, tmp_path, values, message):
    for name, value in zip(VARIABLES, values):
        monkeypatch.setenv(name, value)
    done = spectra("train", "--config=configs/quickstart.py:TriLM", f"--workdir={tmp_path / 'run'}", "--distributed")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_asks_itself():
    assert anywhere(True) is True and anywhere(False) is False
    vote = Vote(jax.make_mesh((1, 8, 1), ("slice", "data", "model")))
    assert [vote.cast(number) for number in (0, 1, 0, 2)] == [0, 1, 0, 2]
