"""What keeps a run going on one machine: the loop that restarts it, and a TPU host that runs it in the background."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from stubs import CONFIG, LAUNCH, TRAIN, Machine, words

from spectra_jax.cli import STOPPED

REAL = ("bash", "cat", "dirname", "env", "id", "mkdir", "nohup", "pgrep", "rm", "setsid", "sleep", "touch")
LOOP = f"source {shlex.quote(str(LAUNCH / 'common.sh'))}; workdir=run; until_done train 'a b' c"
# A training that takes a moment to save when it is asked to stop, and says how often it was asked.
PATIENT = """#!/usr/bin/env bash
trap 'echo stop >> signals-$JAX_PROCESS_ID; asked=1' TERM INT
touch started-$JAX_PROCESS_ID
until [[ $asked ]]; do sleep 0.05; done
for k in {1..10}; do sleep 0.05; done
exit 75
"""


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path, real=REAL)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@contextmanager
def group(machine: Machine, *command: str | Path) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, as a terminal starts it; nothing of the group is left behind.

    SIGINT is heard again, which a shell ignores for what it runs in the background, these tests perhaps among it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command, env=machine.env, cwd=machine.home, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        signal.signal(signal.SIGINT, before)
        try:
            yield run
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)


def until(condition, seconds: float = 30) -> None:
    """Waits for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("statuses", "calls", "status"),
    [([STOPPED, 1, 0], 3, 0), ([2, 0], 1, 2), ([0, 1], 1, 0), ([1] * 9, 5, 1), ([1, 1, 1, STOPPED, 137, 139], 6, 139)],
)
def test_until_done(statuses, calls, status, machine):
    machine.stub("train", answers=[("", code, None) for code in statuses])
    done = machine.shell(LOOP)
    assert (done.returncode, machine.calls()) == (status, [["train", "a b", "c"]] * calls), done.stderr


def test_a_new_checkpoint_forgives_what_was_before(machine):
    made = [f"run/checkpoints/{step}" for step in (10, 20, 30, 40)]
    machine.stub("train", answers=[*(("", 1, path) for path in made), ("", 1, None), ("", 1, None), ("", 0, None)])
    done = machine.shell(LOOP, SPECTRA_TRIES="2")
    assert done.returncode == 1 and len(machine.calls()) == 5, done.stderr


def test_waits_grow_to_five_minutes(tmp_path):
    machine = Machine(tmp_path)
    machine.stub("train", answers=[("", 1, None)] * 7)
    machine.stub("sleep")
    machine.shell(LOOP, SPECTRA_WAIT_SECONDS="60", SPECTRA_TRIES="6")
    assert [call[1] for call in machine.calls() if call[0] == "sleep"] == ["60", "120", "240", "300", "300"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_loop_is_heard_once_and_ends_it(number, machine):
    executable(machine.bin / "train", PATIENT)
    with group(machine, "bash", "-c", LOOP) as run:
        until(lambda: (machine.home / "started-").exists())
        os.killpg(run.pid, number)  # as Ctrl-C, a shutdown and tpu_worker.sh stop send it: to all of the group
        run.communicate(timeout=30)
    assert run.returncode == STOPPED
    assert (machine.home / "signals-").read_text() == "stop\n"


def test_a_slurm_job_that_was_cancelled_is_not_queued_again(machine):
    """scancel signals the script of the job too; the signal before the end of its time goes to the tasks alone."""
    executable(machine.bin / "srun", PATIENT)
    machine.stub("scontrol")
    with group(machine, "bash", LAUNCH / "slurm.sh", "job", "--workdir=run", "--", CONFIG) as run:
        until(lambda: (machine.home / "started-").exists())
        os.killpg(run.pid, signal.SIGTERM)
        run.communicate(timeout=30)
    assert (run.returncode, machine.calls()) == (STOPPED, [])


@pytest.fixture
def host(machine):
    """A TPU host with the checkout in its home folder, and the name of a run that no other test has."""
    (machine.home / "spectra_jax").symlink_to(LAUNCH.parent)
    name = f"launch-test-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    yield machine, name, machine.home / "spectra-venv" / "bin"
    machine.shell(f"bash spectra_jax/launch/tpu_worker.sh stop --name={name}")


def worker(host: tuple[Machine, str, Path], action: str) -> subprocess.CompletedProcess:
    """What `tpu_vm.sh ACTION` has its hosts do."""
    machine, name, _ = host
    # The commands of `up` in their order: create, state, setup, run, status, delete.
    index = {"run": 3, "status": 4}.get(action, 0)
    arguments = ("up" if index else action, "--project=P", "--zone=Z", "--accelerator-type=v5p-8", "--repository=R",
                 "--commit=C", f"--name={name}", "--workdir=a run", "--dry-run", "--", *TRAIN)
    printed = machine.launch("tpu_vm.sh", *arguments)
    assert printed.returncode == 0, printed.stderr
    return machine.shell(words(printed.stdout)[index][-1].removeprefix("--command="))


def test_a_host_trains_until_done(host):
    machine, name, venv = host
    machine.stub("spectra", folder=venv, answers=[("one", STOPPED, None), ("two", 1, None), ("three", 0, None)])
    assert worker(host, "status").stdout == "absent\n"
    worker(host, "run")
    until(lambda: worker(host, "status").stdout == "finished 0\n")
    assert machine.calls(venv) == [["spectra", "train", "--distributed", "--workdir=a run", *TRAIN]] * 3
    log = (machine.home / "spectra-logs" / f"{name}.log").read_text()
    assert [word for word in ("one", "two", "three") if f"{word}\n" in log] == ["one", "two", "three"]


def test_a_host_is_started_once_and_stopped_by_one_signal(host):
    machine, name, venv = host
    executable(venv / "spectra", PATIENT)
    worker(host, "run")
    until(lambda: (machine.home / "started-").exists())
    assert worker(host, "status").stdout == "running\n"
    assert f"{name} is on already" in worker(host, "run").stderr
    assert worker(host, "stop").returncode == 0
    assert worker(host, "status").stdout == "absent\n", "whoever was stopped is started again by `up`"
    assert (machine.home / "signals-").read_text() == "stop\n"


def test_a_host_that_cannot_train_says_so(host):
    machine, _, venv = host
    machine.stub("spectra", folder=venv, answers=[("error: unknown key", 2, None)])
    worker(host, "run")
    until(lambda: worker(host, "status").stdout == "finished 2\n")
    assert len(machine.calls(venv)) == 1


def test_the_setup_of_a_host(machine):
    machine.stub("sudo", "gcsfuse", "python3")
    machine.stub("mountpoint", answers=[("", 1, None), ("", 0, None)])
    for _ in range(2):
        done = machine.launch("tpu_worker.sh", "setup", "--bucket=B")
        assert done.returncode == 0, done.stderr
    calls = [call for call in machine.calls() if call[0] != "mountpoint"]
    venv = machine.home / "spectra-venv"
    install = [
        ["python3", "-m", "pip", "install", "-q", "--user", "uv"],
        ["python3", "-m", "uv", "venv", "-q", "--allow-existing", "--python=3.12", f"{venv}"],
        ["python3", "-m", "uv", "pip", "install", "-q", f"--python={venv}/bin/python", "-e", f"{LAUNCH.parent}[tpu]"],
    ]
    assert calls[0] == ["sudo", "mkdir", "-p", "/mnt/spectra"] and calls[1][:2] == ["sudo", "chown"]
    assert calls[2][0] == "gcsfuse" and calls[2][-2:] == ["B", "/mnt/spectra"]
    assert calls[3:] == [*install, *install], "mounted once"


LOCAL = ("bash", LAUNCH / "local.sh", "--port=12345", "--", CONFIG)  # with a stub in place of spectra


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_signal_on_once_to_each(number, machine):
    executable(machine.bin / "spectra", PATIENT)
    with group(machine, *LOCAL) as run:
        until(lambda: all((machine.home / f"started-{k}").exists() for k in range(2)))
        os.killpg(run.pid, number)
        said = run.communicate(timeout=30)[1]
    assert run.returncode == STOPPED, said
    assert [(machine.home / f"signals-{k}").read_text() for k in range(2)] == ["stop\n"] * 2


def test_local_exits_as_the_first_that_failed(machine):
    executable(machine.bin / "spectra", "#!/usr/bin/env bash\n((JAX_PROCESS_ID)) && exit 7\nsleep 1\nexit 1\n")
    with group(machine, *LOCAL) as run:
        said = run.communicate(timeout=30)[1]
    assert run.returncode == 7, said
    assert "process 1: exit status 7" in said and "process 0: exit status 1" in said
