"""A checkpoint of any family, ready to run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from spectra_jax.checkpoint import Checkpoints
from spectra_jax.checksum import dotted
from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.data.tokenizer import Tokenizer
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import freeze, graphdef_of, init_parameters, plain
from spectra_jax.schema import Config, Mesh
from spectra_jax.sharding import make_mesh
from spectra_jax.stored import abstract, parse_checkpoint, record_of
from spectra_jax.train.workdir import read_config
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import is_form, part_sharding, skeleton
from spectra_jax.weights.packed import spread, unpack

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


def load(
    checkpoint: str, *, latent: bool | None = False, devices: Sequence[jax.Device] | None = None,
    model_parallel: int = 1,
) -> Loaded:
    """Loads `WORKDIR[@STEP]`, by default the newest step, spread over the devices of this machine.

    Args:
      latent: keep latent weights instead of freezing them to codes and scales. None: keep them where there are any that
        hold the matrix.
      devices: where to; by default all. The mesh that the model was trained on does not matter.
      model_parallel: devices that share a matrix and the heads (the mesh's "model" axis).

    Raises:
      UserError: no such run or step, or the checkpoint does not fit its config.
    """
    workdir, step = parse_checkpoint(checkpoint)
    config = read_config(workdir)
    devices = list(devices or jax.devices())
    sized = replace(config.data, batch=EVALUATION_BATCH * len(devices))
    config = replace(config, mesh=Mesh(model=model_parallel), data=sized, train=replace(config.train, accumulate=1))
    mesh = make_mesh(config, devices)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.chosen(step)[-1]
    record = record_of(checkpoints.path(step))
    with jax.set_mesh(mesh):
        like = jax.eval_shape(partial(init_parameters, config.model), jax.random.key(0))
        like, forms = abstract(like, mesh), record.get("forms")
        like = plain(config.model, like) if forms else like
        if forms and latent:
            raise UserError(f"{checkpoint} holds codes and scales; there are no latent weights to load")
        if forms:
            parameters = _restore_forms(checkpoints, step, like, forms, record["arrays"]["parameters"])
        else:
            parameters = checkpoints.restore_parameters(step, like)
            keep = get_rule(config.model.weight).holds_matrix if latent is None else latent
            parameters = parameters if keep else freeze(config.model, parameters)
        graphdef = graphdef_of(config.model)
    checkpoints.close()
    tokenizer = tokenizers.load(str(workdir / "tokenizer.json"))
    return Loaded(config, mesh, graphdef, parameters, tokenizer, step, record)


def _restore_forms(checkpoints: Checkpoints, step: int, like: PyTree, forms: dict, arrays: dict) -> PyTree:
    """Forms as they compute: nothing packed, everything beside them in float32."""
    as_stored = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, _float_dtype(arrays, path), sharding=leaf.sharding), like
    )
    shapes = spread(skeleton(forms, arrays, as_stored, _part_of_form), like)
    restored = checkpoints.restore_parameters(step, shapes)
    restored = jax.tree.map(lambda x: x if is_form(x) else x.astype(jnp.float32), restored, is_leaf=is_form)
    return unpack(restored, like)


def _float_dtype(arrays: dict, path: tuple) -> str:
    """What an array that is no form was stored in: a packed run rounds it."""
    stored = arrays.get(dotted(path), ["float32"])[0]
    return stored if stored in ("float16", "bfloat16") else "float32"


def _part_of_form(entry: list, matrix: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    dtype, shape, *_ = entry
    return jax.ShapeDtypeStruct(shape, dtype, sharding=part_sharding(tuple(shape), matrix))
