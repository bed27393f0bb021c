"""What a run begins with besides random numbers: the weights of another run, and a teacher."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.model.matrices import HEAD, shards_of
from spectra_jax.model.parameters import block_matrices, plain, with_matrices
from spectra_jax.schema import Config, Model
from spectra_jax.serve.load import Loaded, load
from spectra_jax.train.distillation import Teacher
from spectra_jax.train.sparsity import check_zeros
from spectra_jax.train.step import State, init_state
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import Form, is_form

SHAPE = ("V", "D", "F", "L", "N", "K", "H", "tie_embeddings", "mixer")


def first_state(config: Config, mesh: Mesh, key: Array, loader: Loader) -> State:
    """The state before the first step: random, or with the weights of `config.train.start`.

    Raises:
      UserError: as `started`.
    """
    init = jax.jit(partial(init_state, config))
    state = init(key)
    if config.train.start:
        state = init(key, parameters=started(config, mesh, state["parameters"], loader))
    if config.optimizer.keep_zeros:
        check_zeros(state["optimizer"].mask)
    return state


def started(config: Config, mesh: Mesh, fresh: dict, loader: Loader) -> dict:
    """The parameters of `config.train.start` in the place of `fresh` ones, which tell shapes and shardings.

    Latent weights are taken where that run keeps them, else the matrices that its forms stand for. What a weight rule
    learns beside a matrix begins as the rule says. Gains that only the other run has are dropped, and those that only
    this one has begin at 1.

    Raises:
      UserError: no such checkpoint, one of another shape, or of another tokenizer than the data's.
    """
    source = load(config.train.start, latent=None)
    loader.check_tokenizer(source.tokenizer)
    _refuse_other_shape(config.model, source, config.train.start)
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


def teachers(config: Config, mesh: Mesh, loader: Loader) -> tuple[Teacher, ...]:
    """What a step is given beside state and batch: the teacher of `config.distill`, if there is one.

    Raises:
      UserError: no such checkpoint, or one with another tokenizer, vocabulary or, for features, another shape.
    """
    if not config.distill.teacher:
        return ()
    source, m = load(config.distill.teacher), config.model
    loader.check_tokenizer(source.tokenizer)
    theirs = source.config.model
    needed = ("V", "D", "L") if config.distill.features else ("V",)
    if other := [f"{name}={getattr(theirs, name)}, not {getattr(m, name)}" for name in needed
                 if getattr(theirs, name) != getattr(m, name)]:
        raise UserError(
            f"the teacher {config.distill.teacher} has {', '.join(other)}: logits are compared over one vocabulary, "
            "features between blocks of one width and number; use --config.distill.features=0 for logits alone"
        )
    return (Teacher(source.graphdef, _placed(source.parameters, mesh)),)


def dense(parameters: dict) -> dict:
    """The parameters with the matrix that each form stands for in its place: in blocks, stacked over layers."""
    whole = lambda form: form.dequantize()  # noqa: E731

    def replaced(parameters: PyTree, whole: Callable[[Form], Array]) -> PyTree:
        return jax.tree.map(lambda node: whole(node) if is_form(node) else node, parameters, is_leaf=is_form)

    blocks = replaced(parameters["blocks"], jax.jit(jax.vmap(whole)))
    return {**replaced({**parameters, "blocks": None}, jax.jit(whole)), "blocks": blocks}


def _refuse_other_shape(m: Model, source: Loaded, name: str) -> None:
    theirs = source.config.model
    if other := [f"{key}={getattr(theirs, key)}, not {getattr(m, key)}" for key in SHAPE
                 if getattr(theirs, key) != getattr(m, key)]:
        raise UserError(f"config.train.start={name} has {', '.join(other)}; give this run the same shape")


def _placed(parameters: PyTree, mesh: Mesh) -> PyTree:
    """Arrays of one mesh on another of the same devices, spread alike."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)), parameters)
