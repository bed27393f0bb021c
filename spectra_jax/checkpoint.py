"""Saved states of a run: rolling ones to resume from, permanent ones to keep. The only file that knows Orbax.

A checkpoint holds two trees, "parameters" and "training" (optimizer, step, counts), so that evaluation reads the
first alone, and a record of what made it: config, tokens, data fingerprint, commit, versions.
"""

import logging
import subprocess
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from spectra_jax.errors import UserError
from spectra_jax.schema import Config

FOLDER = "checkpoints"

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

    def save(self, step: int, state: Mapping[str, PyTree], record: Mapping[str, Any]) -> None:
        """Starts to save; the arrays are copied before it returns, so that the state may be donated.

        Raises:
          UserError: the save before this one failed, e.g. for want of space.
        """
        trees = {
            "parameters": state["parameters"],
            "training": {name: tree for name, tree in state.items() if name != "parameters"},
        }
        with _readable_errors(self.folder):
            self._orbax.save_checkpointables_async(step, trees, custom_metadata=dict(record))

    def record(self, step: int) -> dict[str, Any]:
        """What made the checkpoint: the `record` it was saved with."""
        return dict(self._orbax.checkpointables_metadata(step).custom_metadata or {})

    def restore(self, step: int, like: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """The state of `step` with the shapes, dtypes and shardings of `like` (see `abstract`).

        Raises:
          UserError: the checkpoint is damaged, or holds another tree, shape or dtype; every difference is named.
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
        stored = self._orbax.checkpointables_metadata(step).metadata
        _compare(stored, wanted, f"{self.folder}/{step}")
        try:
            return self._orbax.load_checkpointables(step, wanted)
        except KeyError as error:  # all that Orbax says of unreadable files; the cause is at the end of a chain
            cause = error
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__
            raise UserError(
                f"{self.folder}/{step} is damaged: {str(cause).splitlines()[0][:300]}. Copy it again, or remove that "
                f"folder to use an earlier checkpoint; there are {self.steps()}"
            ) from error

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


def _compare(stored: Mapping[str, PyTree], wanted: Mapping[str, PyTree], where: str) -> None:
    """Refuses to load into another tree: Orbax itself would cast dtypes and hide the cause of the rest."""
    found, asked = ({name: _leaves(tree[name]) for name in wanted} for tree in (stored, wanted))
    faults = []
    for name in wanted:
        for path in sorted(found[name].keys() | asked[name].keys()):
            a, b = found[name].get(path), asked[name].get(path)
            if a != b:
                faults.append(f"{name}.{path}: the checkpoint has {_text(a)}, the config asks for {_text(b)}")
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise UserError(
            f"{where} is of another model or optimizer:\n  " + "\n  ".join(faults[:8]) + more
            + "\nuse the config that the checkpoint was made with (config.json beside it), or another workdir"
        )


def _leaves(tree: PyTree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def _text(leaf: tuple | None) -> str:
    return "nothing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


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
