"""The real trainer in processes of its own, to be killed, stopped, starved and started again."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT, TINY, arguments, data, environment

from spectra_jax import metrics

STEPS, EVERY = 300, 40
OVERRIDES = (
    *TINY, "train.accumulate=2", "train.loss_chunks=1", "model.attention_blocks=1", f"train.steps={STEPS}",
    f"checkpoint.every_steps={EVERY}", "checkpoint.permanent_tokens=0", "evaluate.every_steps=60",
    "metrics.weights_every_steps=0", "train.heartbeat_seconds=10",
)
CLOCK = ("tokens_per_second", "mfu", "stall")  # what no two runs have in common


@dataclass
class Trainer:
    """One run of TriLM's schedule with both interventions, in one process or several."""

    workdir: Path
    processes: list[subprocess.Popen]

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Waits for it, or for the end of the first process."""
        deadline = time.monotonic() + seconds
        while not condition() and self.processes[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)

    def beyond(self, step: int) -> "Trainer":
        """Waits until this step has passed."""
        self.until(lambda: last_step(self.workdir) > step)
        return self

    def send(self, number: signal.Signals, *, to: int = 0) -> "Trainer":
        """Sends a signal to one of the processes."""
        self.processes[to].send_signal(number)
        return self

    def end(self, seconds: float = 150) -> list[tuple[int, str]]:
        """Waits for all; (exit status, what was written on stderr) of each."""
        said = [process.communicate(timeout=seconds)[1] for process in self.processes]
        return [(process.returncode, text) for process, text in zip(self.processes, said)]

    def stop(self, beyond: int, number: signal.Signals) -> str:
        """Sends a signal to a single process once this step has passed; what it wrote on stderr."""
        ((_, said),) = self.beyond(beyond).send(number).end()
        assert last_step(self.workdir) < STEPS, "it was finished before it could be stopped"
        return said


def start(
    workdir: Path, *overrides: str, quick: bool = True, processes: int = 1, devices: int = 1,
    settings: dict[str, str] | None = None, wrap: tuple[str, ...] = (),
) -> Trainer:
    """Starts the run as a user types it.

    Args:
      quick: compile fast, with programs shared between processes; a user's own compilation otherwise.
      devices: CPU devices of each process.
      settings: environment variables of its own.
      wrap: what stands on the command line instead of `-m spectra_jax.train`.
    """
    command = [
        sys.executable, *(wrap or ("-m", "spectra_jax.train")), "--config=configs/quickstart.py:TriLM",
        f"--workdir={workdir}", f"--config.data.sets={data()}", *arguments((*OVERRIDES, *overrides)),
    ]
    env = environment(quick=quick) | {"JAX_NUM_CPU_DEVICES": str(devices)} | (settings or {})
    if processes > 1:
        command.append("--distributed")
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    return Trainer(workdir, [
        subprocess.Popen(
            command, env=env | {"JAX_PROCESS_ID": str(k)}, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        ) for k in range(processes)
    ])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def last_step(workdir: Path) -> int:
    """The newest training step on record."""
    if not (workdir / metrics.FILE).exists():
        return 0
    return max((r["step"] for r in metrics.read(workdir) if r["kind"] == "train"), default=0)


def comparable(workdir: Path) -> list[dict]:
    """All records but those of time, without what depends on the clock or on where a process began."""
    return [
        {k: v for k, v in r.items() if k not in CLOCK and not k.endswith("/flips")}
        for r in metrics.read(workdir) if r["kind"] != "time"
    ]


def losses(workdir: Path) -> list[float]:
    """Every training loss, in the order of the file, whose steps must be 1, 2, ..."""
    found = [(r["step"], r["loss"]) for r in metrics.read(workdir) if r["kind"] == "train"]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), "no step is missing, none is there twice"
    return [loss for _, loss in found]
