"""Where a run begins: with random parameters, or with those of another run (`config.train.start`)."""

from functools import partial
from pathlib import Path

import jax
from jaxtyping import PyTree

from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.model.parameters import init_parameters
from spectra_jax.record import compare
from spectra_jax.schema import Config
from spectra_jax.stored import parse_checkpoint, record_of
from spectra_jax.train.workdir import read_config


def check_start(config: Config, loader: Loader, out: Path) -> None:
    """Refuses what the run `out` cannot begin with, before anything of it is written. One that is there has begun.

    Raises:
      UserError: no such run or step, codes instead of weights, another shape, or data of another tokenizer.
    """
    if not config.train.start or (out / "config.json").is_file():
        return
    workdir, step = parse_checkpoint(config.train.start)
    read_config(workdir)
    checkpoints = Checkpoints(workdir)
    path = checkpoints.path(checkpoints.chosen(step)[-1])
    checkpoints.close()
    record = record_of(path)
    if record.get("forms"):
        raise UserError(f"config.train.start={config.train.start} holds codes and scales, which cannot be trained; "
                        "begin with the float run that it was made of")
    like = jax.eval_shape(partial(init_parameters, config.model), jax.random.key(0))
    compare({"parameters": record["arrays"]["parameters"]}, {"parameters": like}, path)
    loader.check_tokenizer(tokenizers.load(str(workdir / "tokenizer.json")))


def started(config: Config, state: dict[str, PyTree]) -> dict[str, PyTree]:
    """The fresh state, with the parameters of `config.train.start` in place of its own if there is such a run.

    Raises:
      UserError: its parameters are damaged.
    """
    if not config.train.start:
        return state
    workdir, step = parse_checkpoint(config.train.start)
    # Random parameters go before the others come.
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.pop("parameters"))
    checkpoints = Checkpoints(workdir)
    parameters = checkpoints.restore_parameters(checkpoints.chosen(step)[-1], like)
    checkpoints.close()
    return {**state, "parameters": parameters}
