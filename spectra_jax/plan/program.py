"""The real training step, lowered and compiled for devices that are not here."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spectra_jax.errors import UserError
from spectra_jax.plan.topology import GIB
from spectra_jax.schema import Config
from spectra_jax.sharding import batch_sharding
from spectra_jax.stored import abstract
from spectra_jax.train.step import init_state, make_step


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs: what it is given, gives back elsewhere, and needs in between."""

    arguments: int
    results: int
    temporary: int

    @property
    def total(self) -> int:
        """All at once."""
        return self.arguments + self.results + self.temporary


def lowered(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The training step of this config on this mesh, about a second: errors of shapes and shardings show here."""
    if config.model.compute_dtype == "auto":  # which asks the default device, and that is not the one compiled for
        config = replace(config, model=replace(config.model, compute_dtype="bfloat16"))
    with jax.set_mesh(mesh):
        state = abstract(jax.eval_shape(lambda: init_state(config, jax.random.key(0))), mesh)
        shape = (config.data.batch, config.data.T + 1)
        batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
        return jax.jit(make_step(config), donate_argnums=0).lower(state, batch)


def compiled(step: jax.stages.Lowered, hbm: float) -> jax.stages.Compiled:
    """The program, a minute or two of two cores.

    Args:
      hbm: GiB of a device, for the message.

    Raises:
      UserError: it does not fit.
    """
    try:
        return step.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = next((line for line in str(error).splitlines() if "Used" in line or "Exceeded" in line), str(error))
        raise UserError(
            f"the step does not fit in {hbm:g} GiB: {said.strip()} Use a smaller --config.data.batch or a larger "
            "--config.train.accumulate, --config.model.remat=full, or more chips"
        ) from error


def memory(program: jax.stages.Compiled) -> Memory:
    """What the compiler assigned. Donated arguments are results too, and counted once."""
    found = program.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, results, found.temp_size_in_bytes)


def in_gib(size: int) -> str:
    """Two digits after the point."""
    return f"{size / GIB:.2f}"
