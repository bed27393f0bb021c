"""The real training step, lowered and compiled for devices that are not here."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from spectra_jax.errors import UserError
from spectra_jax.plan.topology import GIB
from spectra_jax.schema import Config
from spectra_jax.sharding import batch_sharding
from spectra_jax.stored import abstract
from spectra_jax.train.step import init_state, make_step


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs.

    `peak` is what the compiler holds against the memory there is. (Its size of temporaries is not: that adds up what
    never lives together, and a step with 0.5 + 21.8 GiB by it, and a peak of 15.6, compiles for 15.75.)
    """

    arguments: int
    peak: int  # arguments included

    @property
    def temporary(self) -> int:
        """What comes on top of the arguments."""
        return self.peak - self.arguments


def lowered(config: Config, mesh: Mesh | AbstractMesh, platform: str = "tpu") -> jax.stages.Lowered:
    """The training step of this config on this mesh, about a second: errors of shapes and shardings show here.

    Args:
      mesh: abstract where it is only lowered, for which no device is asked.
      platform: tpu or cuda.
    """
    if config.model.compute_dtype == "auto":  # which asks the default device, and that is not the one compiled for
        config = replace(config, model=replace(config.model, compute_dtype="bfloat16"))
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh):
        state = abstract(jax.eval_shape(lambda: init_state(config, jax.random.key(0))), mesh)
        shape = (config.data.batch, config.data.T + 1)
        batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
        return jax.jit(make_step(config), donate_argnums=0).trace(state, batch).lower(lowering_platforms=(platform,))


def compiled(step: jax.stages.Lowered, memory: float) -> jax.stages.Compiled:
    """The program, a minute or two of two cores.

    Args:
      memory: GiB of a device, for the message.

    Raises:
      UserError: it does not fit.
    """
    try:
        return step.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = next((line for line in str(error).splitlines() if "xceed" in line or "Used" in line), str(error))
        raise UserError(f"the step does not fit in {memory:g} GiB. libtpu: {said.strip()}") from error


def memory(program: jax.stages.Compiled) -> Memory:
    """What the compiler assigned."""
    found = program.memory_analysis()
    return Memory(found.argument_size_in_bytes, found.peak_memory_in_bytes)


def in_gib(size: int | float) -> str:
    """Two digits after the point."""
    return f"{size / GIB:.2f}"
