"""A checkpoint of any family, ready to run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.data.tokenizer import Tokenizer
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import freeze, graphdef_of, init_parameters
from spectra_jax.schema import Config, Mesh
from spectra_jax.sharding import make_mesh
from spectra_jax.stored import abstract, parse_checkpoint, record_of
from spectra_jax.train.workdir import read_config
from spectra_jax.weights.form import part_sharding, skeleton

EVALUATION_BATCH = 8  # sequences per device: enough to be quick, small enough for any machine


@dataclass(frozen=True)
class Loaded:
    """A model with what is needed to run it. `parameters` hold frozen weights where the rule has codes."""

    config: Config
    mesh: jax.sharding.Mesh
    graphdef: nnx.GraphDef
    parameters: PyTree
    tokenizer: Tokenizer
    step: int
    record: dict[str, Any]


def load(checkpoint: str, *, latent: bool = False, devices: Sequence[jax.Device] | None = None) -> Loaded:
    """Loads `WORKDIR[@STEP]`, by default the newest step, spread over the devices of this machine.

    Args:
      latent: keep latent weights instead of freezing them to codes and scales.
      devices: where to; by default all. The mesh that the model was trained on does not matter.

    Raises:
      UserError: no such run or step, or the checkpoint does not fit its config.
    """
    workdir, step = parse_checkpoint(checkpoint)
    config = read_config(workdir)
    devices = list(devices or jax.devices())
    sized = replace(config.data, batch=EVALUATION_BATCH * len(devices))
    config = replace(config, mesh=Mesh(), data=sized, train=replace(config.train, accumulate=1))
    mesh = make_mesh(config, devices)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.chosen(step)[-1]
    record = record_of(checkpoints.path(step))
    with jax.set_mesh(mesh):
        like = jax.eval_shape(partial(init_parameters, config.model), jax.random.key(0))
        like, forms = abstract(like, mesh), record.get("forms")
        if forms and latent:
            raise UserError(f"{checkpoint} holds codes and scales; there are no latent weights to load")
        if forms:
            like = skeleton(forms, record["arrays"]["parameters"], like, _part_of_form)
        parameters = checkpoints.restore_parameters(step, like)
        if not (forms or latent):
            parameters = freeze(config.model, parameters)
        graphdef = graphdef_of(config.model)
    checkpoints.close()
    tokenizer = tokenizers.load(str(workdir / "tokenizer.json"))
    return Loaded(config, mesh, graphdef, parameters, tokenizer, step, record)


def _part_of_form(entry: list, matrix: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    dtype, shape, *_ = entry
    return jax.ShapeDtypeStruct(shape, dtype, sharding=part_sharding(tuple(shape), matrix))
