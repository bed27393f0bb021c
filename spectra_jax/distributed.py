"""Several processes of one run: how they find each other, and questions that all of them must answer alike."""

import os
import sys
from traceback import format_exception
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from spectra_jax.errors import Stopped, UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(heartbeat_seconds: int) -> None:
    """Joins the other processes. To be called before anything that asks JAX for its devices.

    TPU pod slices, Slurm steps, MPI jobs and Kubernetes job sets are recognised by JAX; elsewhere VARIABLES say where
    the first process listens (HOST:PORT), how many there are, and which one this is.

    Args:
      heartbeat_seconds: a process that is silent for so long is taken for dead, and the others end.

    Raises:
      UserError: some of VARIABLES are set and some not, or none is and JAX recognises no cluster.
    """
    found = [os.environ.get(name) for name in VARIABLES]
    if any(found) and not all(found):
        missing = [name for name, value in zip(VARIABLES, found) if not value]
        raise UserError(f"{' and '.join(missing)} not set; several processes need all of {', '.join(VARIABLES)}")
    address, processes, process = found if all(found) else (None, "", "")
    if not all(text.isdecimal() for text in (processes, process) if address):
        raise UserError(f"JAX_NUM_PROCESSES={processes!r} and JAX_PROCESS_ID={process!r} must be numbers")
    try:
        jax.distributed.initialize(
            address, int(processes) if address else None, int(process) if address else None,
            heartbeat_timeout_seconds=heartbeat_seconds, shutdown_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: {error} JAX recognises no cluster here; set {', '.join(VARIABLES)} in every process"
        ) from error


class Joined:
    """Joins the other processes, as `start`; what goes wrong in here ends this process at once, with its message.

    An orderly end would wait for the others, who wait for this one in the middle of a step.
    """

    def __init__(self, heartbeat_seconds: int):
        self._heartbeat = heartbeat_seconds

    def __enter__(self) -> None:
        start(self._heartbeat)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, Stopped):  # all of them stop together
            return
        mine = isinstance(error, UserError)
        print(f"error: {error}" if mine else "".join(format_exception(error)), file=sys.stderr, flush=True)
        os._exit(2 if mine else 1)


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true in any process. All processes must call it; each waits for the others."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag)))) if jax.process_count() > 1 else flag


class Vote:
    """The highest number that any process has cast, the same in all of them, without a wait for the devices.

    Among several processes it is the vote of the call before: its answer came while the last step ran.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._pending: jax.Array | int = 0

    def cast(self, number: int) -> int:
        """Votes, and gives the result. Every process must call it after every step."""
        if jax.process_count() == 1:
            return number
        votes = jax.make_array_from_callback(
            (self._sharding.mesh.size,), self._sharding, lambda index: np.full(1, number, np.int32)
        )
        result, self._pending = int(self._pending), self._highest(votes)
        return result
