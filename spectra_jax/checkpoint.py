"""Saved states of a run: rolling ones to resume from, permanent ones to keep. The only file that knows Orbax.

A checkpoint holds two trees, "parameters" and "training" (optimizer, step, counts), so that evaluation reads the
first alone, and a sealed record: what made it (config, tokens, data fingerprint, commit, versions), and every array's
dtype, shape and checksum, taken on the devices before anything was written. What is on the disk is believed only as
far as it agrees with the record: Orbax alone restores a flipped bit without a word.
"""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from spectra_jax.checksum import checksums, dotted, wrong
from spectra_jax.errors import UserError
from spectra_jax.schema import Config

FOLDER = "checkpoints"
# What Orbax and the libraries below it raise for files that were cut, changed or removed.
UNREADABLE = (KeyError, ValueError, TypeError, AttributeError, OSError)


class Damaged(UserError):
    """A checkpoint cannot be read, or does not hold what was saved."""


# Orbax logs a failed save from every thread that it passes through, each time with its traceback: a thousand lines.
# The exception that reaches us says it once.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno < logging.ERROR)


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous; `close` waits for it."""

    def __init__(self, workdir: Path | str, config: Config | None = None):
        """Opens for reading, and with a config for writing by its schedule.

        Raises:
          UserError: the folder cannot be made.
        """
        self.folder = Path(workdir).absolute() / FOLDER
        if config is None and not self.folder.is_dir():
            raise UserError(f"{self.folder} does not exist: {workdir} holds no checkpoints")
        try:
            if config is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            # Folders of saves that a kill cut short would stay for ever without the clean-up.
            self._orbax = ocp.training.Checkpointer(
                self.folder, **({} if config is None else _policies(config)),
                cleanup_tmp_directories=config is not None,
            )
        except OSError as error:
            raise UserError(f"cannot open {self.folder}: {error.strerror}; use another --workdir") from error

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def should_save(self, step: int) -> bool:
        """Whether the schedule wants this step."""
        return self._orbax.should_save(step)

    def save(self, step: int, state: Mapping[str, PyTree], record: Mapping[str, Any], *, force: bool = False) -> None:
        """Starts to save; the arrays are copied before it returns, so that the state may be donated.

        Args:
          force: save although the schedule does not want this step.

        Raises:
          UserError: the save before this one failed, e.g. for want of space.
        """
        trees = {
            "parameters": state["parameters"],
            "training": {name: tree for name, tree in state.items() if name != "parameters"},
        }
        sealed = _seal({**record, "step": step, "arrays": {name: _described(tree) for name, tree in trees.items()}})
        with _readable_errors(self.folder):
            self._orbax.save_checkpointables_async(step, trees, custom_metadata=sealed, force=force)

    def record(self, step: int) -> dict[str, Any]:
        """The `record` that the checkpoint was saved with, and its arrays: name -> path -> dtype, shape, checksum.

        Raises:
          Damaged: it cannot be read, or is not what was written.
        """
        return self._metadata(step)[1]

    def restore_newest(self, like: Mapping[str, PyTree]) -> tuple[int, dict[str, PyTree]]:
        """The newest step whose checksums hold, and its state. Damaged ones are named on stderr and set aside.

        Raises:
          UserError: none is left, or one holds another tree, shape or dtype.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                return step, self.restore(step, like)
            except Damaged as error:
                damaged.append(self._set_aside(step))
                print(f"{error}\nset aside as {damaged[-1]}", file=sys.stderr, flush=True)
        raise UserError(
            f"no checkpoint in {self.folder} can be used; damaged ones are kept as {', '.join(map(str, damaged))}. "
            "Restore a copy of one of them, or start again to train from the beginning"
        )

    def verify(self, step: int) -> None:
        """Reads all of a checkpoint onto one device and compares it with its checksums.

        Raises:
          Damaged: it is not what was saved.
        """
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        stored, record = self._metadata(step)
        if missing := [name for name in record["arrays"] if not jax.tree.leaves(stored.get(name))]:
            raise self._damaged(step, f"{' and '.join(missing)} cannot be read")
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), dict(stored))
        self._load(step, wanted)

    def size(self, step: int) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in (self.folder / str(step)).rglob("*") if path.is_file())

    def restore(self, step: int, like: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """The state of `step` with the shapes, dtypes and shardings of `like` (see `abstract`).

        Raises:
          Damaged: it cannot be read, or an array is not the one that was saved.
          UserError: it holds another tree, shape or dtype; every difference is named.
        """
        wanted = {
            "parameters": like["parameters"],
            "training": {name: tree for name, tree in like.items() if name != "parameters"},
        }
        loaded = self._load(step, wanted)
        return {"parameters": loaded["parameters"], **loaded["training"]}

    def restore_parameters(self, step: int, like: PyTree) -> PyTree:
        """The parameters alone, without reading the optimizer's state.

        Raises:
          UserError: as `restore`.
        """
        return self._load(step, {"parameters": like})["parameters"]

    def _load(self, step: int, wanted: dict[str, PyTree]) -> dict[str, PyTree]:
        arrays = self.record(step)["arrays"]
        _compare(arrays, wanted, f"{self.folder}/{step}")
        try:
            loaded = self._orbax.load_checkpointables(step, wanted)
        except UNREADABLE as error:
            raise self._damaged(step, _cause(error)) from error
        for name, tree in loaded.items():
            expected = {path: value for path, (_, _, value) in arrays[name].items()}
            if faults := wrong(expected, checksums(tree)):
                more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
                raise self._damaged(step, f"checksums do not hold for {name}: {', '.join(faults[:4])}{more}")
        return loaded

    def _metadata(self, step: int) -> tuple[Mapping[str, PyTree], dict[str, Any]]:
        """The stored trees of shapes, and the record."""
        try:
            found = self._orbax.checkpointables_metadata(step)
            stored, record = found.metadata, dict(found.custom_metadata)
        except UNREADABLE as error:
            raise self._damaged(step, _cause(error)) from error
        seal = record.pop("seal", None)
        if _seal(record)["seal"] != seal:
            raise self._damaged(step, "its record is not what was written")
        return stored, record

    def _damaged(self, step: int, what: str) -> Damaged:
        return Damaged(f"{self.folder}/{step} is damaged: {what}. There are checkpoints of steps {self.steps()}")

    def _set_aside(self, step: int) -> Path:
        """Takes a checkpoint out of the list without deleting it."""
        source = self.folder / str(step)
        number, target = 1, source.with_name(f"{step}.damaged")
        while target.exists():
            number, target = number + 1, source.with_name(f"{step}.damaged-{number + 1}")
        source.rename(target)
        self._orbax.reload()
        return target

    def wait(self) -> None:
        """Returns when nothing is being saved.

        Raises:
          UserError: the save failed.
        """
        with _readable_errors(self.folder):
            self._orbax.wait()

    def close(self) -> None:
        """Waits for the save under way and closes."""
        with _readable_errors(self.folder):
            self._orbax.close()


def _policies(config: Config) -> dict[str, Any]:
    """When to save, and what to keep."""
    decide, keep = ocp.training.save_decision_policies, ocp.training.preservation_policies
    permanent = config.permanent_steps
    return {
        "save_decision_policy": decide.AnySavePolicy([
            decide.FixedIntervalPolicy(config.checkpoint.every_steps),
            decide.SpecificStepsPolicy((*permanent, config.steps)),
        ]),
        "preservation_policy": keep.AnyPreservationPolicy([
            keep.LatestN(config.checkpoint.keep), keep.CustomSteps(permanent),
        ]),
    }


class _readable_errors:
    """Turns what the storage layer raises for a full or unwritable disk into a UserError."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # tensorstore raises ValueError for whatever the operating system refuses, and adds its error number.
        storage = isinstance(error, OSError) or (isinstance(error, ValueError) and "os_error_code=" in str(error))
        if storage:
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(
                f"could not save a checkpoint in {self.folder}: {reason}. Earlier checkpoints are intact: free some "
                "space or give another --workdir, and start again to resume"
            ) from error


def abstract(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Shapes, dtypes and concrete shardings of what `jax.eval_shape` gave, whose shardings name no devices."""

    def concrete(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        spec = PartitionSpec() if sharding is None else sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, tree)


def _compare(arrays: Mapping[str, Mapping[str, list]], wanted: Mapping[str, PyTree], where: str) -> None:
    """Refuses to load into another tree: Orbax itself would cast dtypes and hide the cause of the rest."""
    faults = []
    for name, tree in wanted.items():
        found, asked = {path: entry[:2] for path, entry in arrays[name].items()}, _leaves(tree)
        for path in sorted(found.keys() | asked.keys()):
            a, b = found.get(path), asked.get(path)
            if a != b:
                faults.append(f"{name}.{path}: the checkpoint has {_text(a)}, the config asks for {_text(b)}")
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(
            f"{where} is of another model or optimizer:\n  " + "\n  ".join(faults[:8]) + more
            + "\nuse the config that the checkpoint was made with (config.json beside it), or another workdir"
        )


def _seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a hash of itself."""
    text = json.dumps(record, sort_keys=True)
    return {**record, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _cause(error: BaseException) -> str:
    """What an exception began with, in a line: what Orbax raises last says little."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {str(error)[:300].splitlines()[0] if str(error) else 'no reason given'}"


def _leaves(tree: PyTree) -> dict[str, list]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {dotted(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves}


def _described(tree: PyTree) -> dict[str, list]:
    sums = checksums(tree)
    return {path: [*entry, sums[path]] for path, entry in _leaves(tree).items()}


def _text(leaf: list | None) -> str:
    return "nothing" if leaf is None else f"{leaf[0]}{leaf[1]}"


def make_record(config: Mapping[str, Any], tokens: int, data_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says about its origin, JSON-ready."""
    return {
        "config": dict(config),
        "tokens": tokens,
        "data_fingerprint": data_fingerprint,
        "git_commit": git_commit(),
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
    }


def git_commit() -> str:
    """The commit of the code that runs, with "+changes" if files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
