"""One checkpoint on the disk: reading it, and believing it only as far as it agrees with its record.

Orbax alone restores a flipped bit without a word.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from spectra_jax import record as records
from spectra_jax.checksum import checksums, wrong
from spectra_jax.distributed import anywhere
from spectra_jax.errors import UserError
from spectra_jax.record import Damaged

RECORD = "record"  # the item of a checkpoint beside its trees
# What Orbax and the libraries below it raise for files that were cut, changed or removed.
UNREADABLE = (KeyError, ValueError, TypeError, AttributeError, OSError)


def record_of(path: Path) -> dict[str, Any]:
    """The content that the checkpoint was saved with, and its arrays: name -> path -> dtype, shape, checksum.

    Raises:
      Damaged: it cannot be read, or is not what was written.
    """
    with _readable(path):
        return records.read(path / RECORD)


def load(path: Path, wanted: dict[str, PyTree]) -> dict[str, PyTree]:
    """The trees named in `wanted`, with the shapes, dtypes and shardings given there (see `abstract`).

    Raises:
      Damaged: it cannot be read, in this process or another, or an array is not the one that was saved.
      UserError: it holds another tree, shape or dtype; every difference is named.
    """
    arrays = record_of(path)["arrays"]
    records.compare(arrays, wanted, path)
    fault, me, context = None, jax.process_index(), ocp.Context()
    # Each process reads its own part without waiting for the others: one that cannot would leave them waiting.
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    # Files wait in this host's memory for their way to the devices: no more of them at once than one array.
    context.memory.read_concurrent_bytes = 1 + max(map(_local_bytes, jax.tree.leaves(wanted)))
    try:
        with context, _readable(path):
            loaded = ocp.load_checkpointables(path, wanted)
    except Damaged as error:
        fault = error
    if anywhere(fault is not None):
        raise fault or Damaged(f"{path} cannot be read by another process; see what it printed")
    with _readable(path):
        for name, tree in loaded.items():
            _check(arrays[name], checksums(tree), name)
    return loaded


def verify(path: Path) -> None:
    """Reads a checkpoint, one array after the other, into this host's memory and compares it with its checksums.

    Raises:
      Damaged: it is not what was saved.
    """
    arrays = record_of(path)["arrays"]
    on_host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with _readable(path):
        for name, entries in arrays.items():
            stored = ocp.metadata(path, checkpointable_name=name).metadata
            if records.describe(stored) != {where: entry[:2] for where, entry in entries.items()}:
                raise Damaged(f"{name} holds other arrays than its record")
            leaves, structure = jax.tree.flatten(stored)
            found = {}
            for i, (leaf, where) in enumerate(zip(leaves, records.describe(stored))):
                wanted = [ocp.PLACEHOLDER] * len(leaves)
                wanted[i] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_host)
                tree = ocp.load(path, structure.unflatten(wanted), checkpointable_name=name)
                found |= checksums({where: jax.tree.leaves(tree)[i]})
            _check(entries, found, name)


def size(path: Path) -> int:
    """Bytes on disk."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def abstract(tree: PyTree, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> PyTree:
    """Shapes, dtypes and concrete shardings of what `jax.eval_shape` gave, whose shardings name no devices."""

    def concrete(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        spec = PartitionSpec() if sharding is None else sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, tree)


def parse_checkpoint(text: str) -> tuple[Path, int | None]:
    """WORKDIR or WORKDIR@STEP.

    Raises:
      UserError: STEP is not a number.
    """
    path, at, step = text.rpartition("@")
    if not at:
        return Path(text), None
    if not step.isdigit():
        raise UserError(f"{text}: {step!r} is not a step; write WORKDIR or WORKDIR@STEP")
    return Path(path), int(step)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what is raised for files that were cut, changed or removed into Damaged."""
    try:
        yield
    except (Damaged, *UNREADABLE) as error:
        what = str(error) if isinstance(error, Damaged) else _cause(error)
        steps = sorted(int(other.name) for other in path.parent.glob("*") if other.name.isdigit())
        raise Damaged(f"{path} is damaged: {what}. There are checkpoints of steps {steps}") from error


def _check(entries: Mapping[str, list], found: Mapping[str, str], name: str) -> None:
    """Compares checksums with those on record."""
    if faults := wrong({path: expected for path, (_, _, expected) in entries.items()}, found):
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise Damaged(f"checksums do not hold for {name}: {', '.join(faults[:4])}{more}")


def _cause(error: BaseException) -> str:
    """What an exception began with, in a line: what Orbax raises last says little."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {str(error)[:300].splitlines()[0] if str(error) else 'no reason given'}"


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array that this process reads."""
    return prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize * len(leaf.sharding.addressable_devices)
