"""What a run begins with besides random numbers: the weights of another run, and a teacher."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from spectra_jax import config as configs
from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.model.matrices import HEAD, shards_of
from spectra_jax.model.parameters import block_matrices, plain, with_matrices
from spectra_jax.schema import Config
from spectra_jax.serve.load import load
from spectra_jax.stored import parse_checkpoint
from spectra_jax.train.distillation import Teacher
from spectra_jax.train.sparsity import check_zeros
from spectra_jax.train.step import State, init_state
from spectra_jax.train.workdir import read_config
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import Form, is_form

SHAPE = ("V", "D", "F", "L", "N", "K", "H", "tie_embeddings", "mixer")


def config_from(run: str) -> Any:
    """Where a config file starts that begins with the run WORKDIR[@STEP]: `config.default()` with its family, shape and
    data. Without a run, with the schema's.

    Raises:
      UserError: there is no such run.
    """
    c = configs.default()
    if run:
        found = asdict(read_config(parse_checkpoint(run)[0]))
        c.update({name: found[name] for name in ("family", "model", "data")})
    c.train.start = run
    return c


def first_state(config: Config, mesh: Mesh, key: Array) -> State:
    """The state before the first step: random, or with the weights of `config.train.start`.

    Raises:
      UserError: as `started`.
    """
    init = jax.jit(partial(init_state, config))
    state = init(key)
    if config.train.start:
        state = init(key, parameters=started(config, mesh, state["parameters"]))
    if config.optimizer.keep_zeros:
        check_zeros(state["optimizer"].mask)
    return state


def started(config: Config, mesh: Mesh, fresh: dict) -> dict:
    """The parameters of `config.train.start` in the place of `fresh` ones, which tell shapes and shardings.

    Latent weights are taken where that run keeps them, else the matrices that its stored forms stand for. What a weight
    rule learns beside a matrix begins as the rule says. Gains that only the other run has are dropped, and those that
    only this one has begin at 1.

    Raises:
      UserError: no such step, or a checkpoint that is damaged.
    """
    source = load(config.train.start, latent=None)
    with jax.set_mesh(source.mesh):
        whole = dense(plain(source.config.model, source.parameters))
    parameters = _placed(whole, mesh)

    def build(parameters: dict, fresh: dict) -> dict:
        m, make = config.model, get_rule(config.model.weight).latent
        ws = block_matrices(parameters)
        latent = {key: jax.vmap(partial(make, shards=shards_of(m, key)))(w) for key, w in ws.items()}
        blocks = {name: parameters["blocks"].get(name, node) for name, node in fresh["blocks"].items()}
        rest = {name: parameters[name] for name in fresh if name != "blocks"}
        rest |= {"head": make(rest["head"], HEAD)} if m.quantized_head else {}
        return {**rest, "blocks": with_matrices(blocks, latent)}

    placed = jax.tree.map(lambda leaf: leaf.sharding, fresh)
    return jax.jit(build, out_shardings=placed)(parameters, fresh)


def teachers(config: Config, mesh: Mesh) -> tuple[Teacher, ...]:
    """What a step is given beside state and batch: the teacher of `config.distill`, if there is one.

    Raises:
      UserError: its checkpoint is damaged.
    """
    if not config.distill.teacher:
        return ()
    source = load(config.distill.teacher)
    return (Teacher(source.graphdef, _placed(source.parameters, mesh)),)


def check_sources(config: Config, workdir: Path, loader: Loader) -> None:
    """Refuses what a run cannot begin with or learn from, before anything is written. One that is there has begun.

    Raises:
      UserError: no such run, one of another shape, or of another tokenizer than the data's.
    """
    begun, features = (workdir / "config.json").is_file(), config.distill.features
    same = ("V", "D", "L") if features else ("V",)
    for name, text, keys, fix in (
        ("train.start", "" if begun else config.train.start, SHAPE, "give this run the same shape"),
        ("distill.teacher", config.distill.teacher, same, "or compare logits alone, with --config.distill.features=0"),
    ):
        if text:
            folder, _ = parse_checkpoint(text)
            theirs, m = read_config(folder).model, config.model
            other = [f"{key}={getattr(theirs, key)}, not {getattr(m, key)}" for key in keys
                     if getattr(theirs, key) != getattr(m, key)]
            if other:
                raise UserError(f"config.{name}={text} has {', '.join(other)}; {fix}")
            loader.check_tokenizer(tokenizers.load(str(folder / "tokenizer.json")))


def dense(parameters: dict) -> dict:
    """The parameters with the matrix that each form stands for in its place: in blocks, stacked over layers."""
    whole = lambda form: form.dequantize()  # noqa: E731

    def replaced(parameters: PyTree, whole: Callable[[Form], Array]) -> PyTree:
        return jax.tree.map(lambda node: whole(node) if is_form(node) else node, parameters, is_leaf=is_form)

    blocks = replaced(parameters["blocks"], jax.jit(jax.vmap(whole)))
    return {**replaced({**parameters, "blocks": None}, jax.jit(whole)), "blocks": blocks}


def _placed(parameters: PyTree, mesh: Mesh) -> PyTree:
    """Arrays of one mesh on another of the same devices, spread alike."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), parameters)
