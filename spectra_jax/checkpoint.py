"""Saved states of a run: rolling ones to resume from, permanent ones to keep. With stored.py all that knows Orbax.

A checkpoint holds two trees, "parameters" and "training" (optimizer, step, counts), so that evaluation reads the
first alone and a permanent one may leave out the second, and the record of record.py.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from spectra_jax import stored
from spectra_jax.distributed import anywhere
from spectra_jax.errors import UserError
from spectra_jax.progress import human
from spectra_jax.record import Damaged, Record
from spectra_jax.retention import Plan, Policy
from spectra_jax.schema import Config

FOLDER = "checkpoints"

# Orbax logs a failed save from every thread that it passes through, each time with its traceback: a thousand lines.
# The exception that reaches us says it once.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno < logging.ERROR)


class Checkpoints:
    """The checkpoints of one workdir. Saving and reading back go on beside training; `close` waits for both."""

    def __init__(self, workdir: Path | str, config: Config | None = None):
        """Opens for reading, and with a config for writing by its schedule.

        Raises:
          UserError: the folder cannot be made.
        """
        self.folder = Path(workdir).absolute() / FOLDER
        if config is None and not self.folder.is_dir():
            raise UserError(f"{self.folder} does not exist: {workdir} holds no checkpoints")
        self.plan = Plan(config) if config else None
        self._policy = Policy(self.plan) if config else None
        self._read_back = bool(config and config.checkpoint.read_back and jax.process_index() == 0)
        self._threads, self._needed = ThreadPoolExecutor(2, "checkpoints"), 0
        self._child: subprocess.Popen | None = None
        self._done: Future = Future()
        self._done.set_result(None)
        self._saving = self._reading = self._done
        try:
            if config is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._orbax = ocp.training.Checkpointer(
                self.folder, preservation_policy=self._policy,
                # Folders of saves that a kill cut short would stay for ever without the clean-up.
                cleanup_tmp_directories=config is not None,
            )
        except OSError as error:
            raise UserError(f"cannot open {self.folder}: {error.strerror}; use another --workdir") from error

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / str(step)

    def chosen(self, step: int | None) -> list[int]:
        """That step alone, or all for None.

        Raises:
          UserError: there is no such checkpoint, or none at all.
        """
        found = self.steps()
        if not found or (step is not None and step not in found):
            of = "" if step is None else f" of step {step}"
            raise UserError(f"{self.folder.parent} has no checkpoint{of}; it has {found}")
        return found if step is None else [step]

    def save(self, step: int, state: Mapping[str, PyTree], content: Mapping[str, Any], *, full: bool = False) -> None:
        """Starts to save; the arrays are copied before it returns, so that the state may be donated.

        Args:
          content: goes into the record.
          full: save the whole state whatever the plan says.

        Raises:
          UserError: the save before this one failed, e.g. for want of space.
        """
        self.wait()
        trees = _trees(state)
        if not trees["training"] or (self.plan.weights_only(step) and not full):
            del trees["training"]
        self._needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        items = {**trees, stored.RECORD: Record({**content, "step": step}, trees)}
        with _save_errors(self.folder, self._needed):
            # Weights alone that a run saved before it was resumed from further back are saved again.
            response = self._orbax.save_checkpointables_async(step, items, force=True, overwrite=step in self.steps())
        self._saving = self._threads.submit(self._finish, response.result)
        if self._read_back and "training" in trees and not self.reading:
            self._policy.reading = step
            self._reading = self._threads.submit(self._read, step, self._saving)

    def _finish(self, wait: Callable[[], bool]) -> None:
        with _save_errors(self.folder, self._needed):
            wait()

    def _read(self, step: int, saving: Future) -> None:
        """Reads back what was saved, so that retention knows; in another process, as Orbax's threads share a state."""
        if saving.exception() is None:
            command = [sys.executable, "-m", "spectra_jax.verify", f"{self.folder.parent}@{step}"]
            # In a session of its own a Ctrl-C that is meant for training does not reach it.
            self._child = subprocess.Popen(
                command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True, start_new_session=True,
            )
            os.setpriority(os.PRIO_PROCESS, self._child.pid, 10)  # training goes first
            _, said = self._child.communicate()
            if self._child.returncode == 0:
                self._policy.sound.add(step)
            elif self._child.returncode != -signal.SIGTERM:
                said = f"reading back step {step}: {said.strip()}\nan older checkpoint stays"
                print(said, file=sys.stderr, flush=True)

    def restore_newest(self, like: Mapping[str, PyTree]) -> tuple[int, dict[str, PyTree]] | None:
        """The newest full state whose checksums hold, and its step; None where there are weights alone or nothing.

        Damaged ones are named on stderr and set aside; of several processes, all take the same one.

        Raises:
          UserError: only damaged ones are there, or one holds another tree, shape or dtype.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                if "training" not in stored.record_of(self.path(step))["arrays"]:
                    continue
                state = self.restore(step, like)
            except Damaged as error:
                damaged.append(self._set_aside(step))
                print(f"{error}\nset aside as {damaged[-1]}", file=sys.stderr, flush=True)
            else:
                if self._policy:
                    self._policy.sound.add(step)
                return step, state
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} can be used; damaged ones are kept as {', '.join(map(str, damaged))}. "
                "Restore a copy of one of them, or start again to train from the beginning"
            )
        return None

    def restore(self, step: int, like: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """The state of `step` with the shapes, dtypes and shardings of `like` (see `stored.abstract`).

        Raises:
          UserError: as `stored.load`.
        """
        loaded = stored.load(self.path(step), _trees(like))
        return {"parameters": loaded["parameters"], **loaded["training"]}

    def restore_parameters(self, step: int, like: PyTree) -> PyTree:
        """The parameters alone, without reading the optimizer's state.

        Raises:
          UserError: as `stored.load`.
        """
        return stored.load(self.path(step), {"parameters": like})["parameters"]

    def _set_aside(self, step: int) -> Path:
        """Takes a checkpoint out of the list without deleting it."""
        source = self.path(step)
        number, target = 1, source.with_name(f"{step}.damaged")
        while target.exists():
            number, target = number + 1, source.with_name(f"{step}.damaged-{number + 1}")
        anywhere(True)  # all processes have found the free name before one takes it
        if jax.process_index() == 0:
            source.rename(target)
        anywhere(True)
        self._orbax.reload()
        return target

    @property
    def reading(self) -> bool:
        """Whether a checkpoint is being read back."""
        return not self._reading.done()

    @property
    def failed(self) -> bool:
        """Whether the last save has failed; `wait` raises what it failed of."""
        return self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Returns when nothing is being saved.

        Raises:
          UserError: the save failed.
        """
        saving, self._saving = self._saving, self._done
        saving.result()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Closes; where something went wrong, without waiting for what reading back would say."""
        if kind and self._child:
            self._child.terminate()
        self.close()

    def close(self) -> None:
        """Waits for what is under way, reading back included, and closes.

        Raises:
          UserError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._threads.shutdown()
            with _save_errors(self.folder, self._needed):  # it raises once more what the last save failed of
                self._orbax.close()


def _trees(state: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """A state as the items of a checkpoint."""
    return {
        "parameters": state["parameters"],
        "training": {name: tree for name, tree in state.items() if name != "parameters"},
    }


@contextmanager
def _save_errors(folder: Path, needed: int) -> Iterator[None]:
    """Turns what the storage layer raises for a full or unwritable disk into a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        # tensorstore raises ValueError for whatever the operating system refuses, and adds its error number.
        if not isinstance(error, OSError) and "os_error_code=" not in str(error):
            raise
        raise UserError(
            f"could not save a checkpoint in {folder}: {str(error).strip().splitlines()[0][:300]}. It needs "
            f"{human(needed)}B at most, {human(shutil.disk_usage(folder).free)}B are free. Earlier checkpoints are "
            "intact: free some space or give another --workdir, and start again to resume"
        ) from error


