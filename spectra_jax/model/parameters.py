"""A model as (graphdef, parameters): a static description and a plain dict of arrays.

Training, checkpoints, optimizers and quantizers see only the dict; `nnx.merge(graphdef, parameters)` is the model.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, PyTree

from spectra_jax.checksum import dotted
from spectra_jax.model.matrices import HEAD, MATRICES, Key, head_statistics, shape_of, shards_of, stacked_statistics
from spectra_jax.model.transformer import Transformer, get_mixer
from spectra_jax.schema import Model
from spectra_jax.sharding import Rules
from spectra_jax.suite import Parameters, count_parameters
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import Form
from spectra_jax.weights.rule import Latent


def graphdef_of(m: Model, rules: Rules = Rules()) -> nnx.GraphDef:
    """The static half of the model, without making any array."""
    return nnx.graphdef(jax.eval_shape(lambda: Transformer(m, rules, rngs=nnx.Rngs(jax.random.key(0)))))


def init_parameters(m: Model, key: Array, rules: Rules = Rules()) -> dict:
    """Random parameters as a nested dict of float32 arrays; call it under jit, so that shards are born in place."""
    return nnx.to_pure_dict(nnx.state(Transformer(m, rules, rngs=nnx.Rngs(key)), nnx.Param))


def apply(graphdef: nnx.GraphDef, parameters: PyTree) -> Transformer:
    """The model with these parameters, latent or frozen."""
    return nnx.merge(graphdef, parameters)


def count(m: Model) -> Parameters:
    """Parameters of a model by kind."""
    rule = get_rule(m.weight)
    found = count_parameters(
        D=m.D, F=m.F, N=m.N, K=m.K, H=m.H, L=m.L, V=m.V, tied=m.tie_embeddings, block_norms=not rule.normalises_input,
    )
    beside = get_mixer(m.mixer).learned(m) + sum(rule.learned(*shape_of(m, key)) for key in MATRICES)
    of_head = rule.learned(m.D, m.V) if m.quantized_head else 0
    return replace(found, norm=found.norm + m.L * beside + of_head)


def block_matrices(parameters: dict) -> dict[Key, Latent | Form]:
    """The stacked matrices (L, in, out) of every kind, latent or frozen, also on the host, or their shapes."""
    return {(module, name): parameters["blocks"][module][name]["w"] for module, name in MATRICES}


def is_block_matrix(path: tuple) -> bool:
    """Whether a leaf of the parameters is a stack of block matrices, latent ones."""
    name = dotted(path)
    return name.startswith("blocks.") and name.endswith(".w")


def plain(m: Model, parameters: dict) -> dict:
    """The parameters without what the weight rule learns beside its matrices; stored forms stay as they are."""
    matrix = get_rule(m.weight).matrix
    ws = {key: w if isinstance(w, Form) else matrix(w) for key, w in block_matrices(parameters).items()}
    found = {**parameters, "blocks": with_matrices(parameters["blocks"], ws)}
    if m.quantized_head and not isinstance(parameters["head"], Form):
        found["head"] = matrix(parameters["head"])
    return found


@partial(jax.jit, static_argnums=0)  # as training is: op by op, XLA rounds the last bit of the scales otherwise
def _frozen_matrices(m: Model, ws: dict[Key, Latent]) -> dict[Key, Form]:
    rule, statistics = get_rule(m.weight), stacked_statistics(m, ws)
    return {
        key: jax.vmap(partial(rule.freeze, shards=shards_of(m, key)))(w, statistics[key]) for key, w in ws.items()
    }


@partial(jax.jit, static_argnums=0)
def _frozen_head(m: Model, head: Latent) -> Form:
    rule = get_rule(m.weight)
    return rule.freeze(head, head_statistics(rule, head), HEAD)


def freeze(m: Model, parameters: dict) -> dict:
    """The parameters with every block matrix, and a quantized head, in stored forms; the same graphdef runs them.

    Embedding, float head and gains are those passed in, not copies; so is everything if nothing of the model is
    quantized, or all that is has its stored form already.
    """
    ws = block_matrices(parameters)
    if not get_rule(m.weight).quantized or any(isinstance(w, Form) for w in ws.values()):
        return parameters
    frozen = _frozen_matrices(m, ws)
    head = {"head": _frozen_head(m, parameters["head"])} if m.quantized_head else {}
    return {**parameters, **head, "blocks": with_matrices(parameters["blocks"], frozen)}


def with_matrices(blocks: dict, matrices: Mapping[Key, Latent | Form]) -> dict:
    """The parameters of blocks (or of one) with some matrices replaced."""
    blocks = {name: dict(node) for name, node in blocks.items()}
    for (module, name), w in matrices.items():
        blocks[module][name] = {"w": w}
    return blocks
