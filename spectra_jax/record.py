"""What a checkpoint says of itself: what made it, and every array's dtype, shape and checksum, sealed with a hash."""

import hashlib
import json
import subprocess
from collections.abc import Awaitable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from spectra_jax.checksum import dotted, read_sums, start_sums
from spectra_jax.errors import UserError

FILE = "record.json"


class Damaged(UserError):
    """A checkpoint cannot be read, or does not hold what was saved."""


class Record:
    """A record on its way to the disk, as one item of a checkpoint.

    The checksums are started when it is made and waited for in Orbax's own thread; the checkpoint gets its final name
    only when the record is written as well.
    """

    def __init__(self, content: Mapping[str, Any], trees: Mapping[str, PyTree]):
        """`content` goes into the record as it is; the arrays of `trees` may be donated once this returns."""
        self._content, self._trees = dict(content), {name: describe(tree) for name, tree in trees.items()}
        self._sums = {name: start_sums(tree) for name, tree in trees.items()}

    async def save(self, directory: Any) -> Awaitable[None]:
        """Called by Orbax on the training thread; what it returns runs beside it."""
        return self._write(directory)

    async def _write(self, directory: Any) -> None:
        folder = await directory.await_creation()
        arrays = {
            name: {path: [*entry, sums[path]] for path, entry in self._trees[name].items()}
            for name, sums in ((name, read_sums(started)) for name, started in self._sums.items())
        }
        if jax.process_index() == 0:
            (folder / FILE).write_text(json.dumps(_seal({**self._content, "arrays": arrays})))

    async def load(self, directory: Any) -> Awaitable[None]:
        """Orbax asks for it and never calls it."""
        raise TypeError("a record is read by `read`, without Orbax")


def read(folder: Path) -> dict[str, Any]:
    """The record in this folder; its "arrays": name of the tree -> path -> [dtype, shape, checksum].

    Raises:
      Damaged: it is not there, or not what was written.
    """
    try:
        record = json.loads((folder / FILE).read_text())
        seal = record.pop("seal", None)
    except (OSError, ValueError, AttributeError) as error:
        raise Damaged(f"its record cannot be read: {type(error).__name__}: {error}") from error
    if _seal(record)["seal"] != seal:
        raise Damaged("its record is not what was written")
    return record


def describe(tree: PyTree) -> dict[str, list]:
    """Dotted path -> [dtype, shape] of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {dotted(path): [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves}


def compare(arrays: Mapping[str, Mapping[str, list]], wanted: Mapping[str, PyTree], where: Path) -> None:
    """Refuses to load into another tree: Orbax itself would cast dtypes and hide the cause of the rest.

    Raises:
      UserError: naming every difference.
    """
    faults = []
    for name, tree in wanted.items():
        found, asked = {path: entry[:2] for path, entry in arrays[name].items()}, describe(tree)
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


def _text(leaf: list | None) -> str:
    return "nothing" if leaf is None else f"{leaf[0]}{leaf[1]}"


def _seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a hash of itself."""
    text = json.dumps(record, sort_keys=True)
    return {**record, "seal": hashlib.sha256(text.encode()).hexdigest()}


def make_record(config: Mapping[str, Any], tokens: int | None, data_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says about its origin, JSON-ready. None: nobody knows on how many tokens it was trained."""
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
