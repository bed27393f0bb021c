"""Signals become wishes, a hung process ends with its stacks shown, a folder has one run."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, environment

from spectra_jax.errors import UserError
from spectra_jax.train.guard import SIGNALS, StopRequest, Watchdog, only_run_in


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_wish_and_the_second_leaves(number, capfd):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while stop.signal is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.signal == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert f"{number.name}: saving after this step" in capfd.readouterr().err
    send = f"    os.kill(os.getpid(), {number.value})\n"
    done = run(f"with StopRequest():\n{send}{send}    time.sleep(30)")
    assert done.returncode == 128 + number and done.stderr.count("saving after this step") == 1


def test_other_signals_are_not_wishes():
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # heard after the other, by the same thread
        deadline = time.monotonic() + 10
        while stop.signal is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.signal == signal.SIGTERM
    signal.signal(signal.SIGUSR1, before)


def script(seconds: float, body: str) -> subprocess.CompletedProcess:
    """A process under a watchdog."""
    return run(f"with Watchdog({seconds}) as dog:\n    {body}")


def run(text: str) -> subprocess.CompletedProcess:
    """A Python process."""
    text = "import os, time\nfrom spectra_jax.train.guard import StopRequest, Watchdog\n" + text
    return subprocess.run(
        [sys.executable, "-c", text], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_hung_process_ends_and_shows_where():
    done = script(0.3, "time.sleep(30)")
    assert done.returncode == 1 and "Timeout (0:00:00.3" in done.stderr and 'File "<string>", line 4' in done.stderr


@pytest.mark.parametrize(
    ("seconds", "body"), [(1.0, "[(time.sleep(0.4), dog.kick()) for _ in range(5)]"), (0, "time.sleep(0.2)")]
)
def test_a_process_that_gets_on_is_left_alone(seconds, body):
    done = script(seconds, body + "\ntime.sleep(0.1)")
    assert done.returncode == 0 and not done.stderr


def test_the_watchdog_is_gone_afterwards():
    with Watchdog(0.2):
        pass
    assert script(0.2, "pass\ntime.sleep(0.5)").returncode == 0


def test_one_run_in_a_folder(tmp_path):
    workdir = tmp_path / "new" / "run"
    with only_run_in(workdir):
        with pytest.raises(UserError, match=f"run is in use by process {os.getpid()}: .*use another --workdir"):
            with only_run_in(workdir):
                pass
    with only_run_in(workdir):
        assert (workdir / "lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot write to .*file/run: .*use another --workdir"):
        with only_run_in(tmp_path / "file" / "run"):
            pass
