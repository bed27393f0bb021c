"""Another format's model as a run of ours, which every command takes like one that was trained here.

Each device reads its own part of each tensor, straight from the files. A matrix that holds scale times code already,
as released TriLMs do, is taken apart exactly: its scale is the largest magnitude of the shard. (To take the mean
magnitude again, as training does, would shrink the scale by the share of zeros.)
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from spectra_jax import config as configs
from spectra_jax.checks import check
from spectra_jax.data.tokenizer import Tokenizer
from spectra_jax.errors import UserError, one_of
from spectra_jax.interop.gguf_source import open_file
from spectra_jax.interop.hf_source import open_folder
from spectra_jax.interop.llama import NORMS, THEIRS, Source
from spectra_jax.made import refuse_existing, write_made
from spectra_jax.model.matrices import MATRICES, shards_of
from spectra_jax.model.parameters import init_parameters
from spectra_jax.record import make_record
from spectra_jax.schema import Config, Data, Model, Train
from spectra_jax.sharding import make_mesh
from spectra_jax.stored import abstract
from spectra_jax.weights import get_rule
from spectra_jax.weights.frozen import Frozen, expand
from spectra_jax.weights.rule import Shards

FAMILIES = {"float": "FloatLM", "ternary": "TriLM", "binary": "BiLM"}
T_LIMIT = 2048  # a longer context is a choice, not a default: evaluation pays for it


def import_model(
    path: Path | str, out: Path | str, *, weight: str = "float", scale_shards: int = 1, tokenizer: str | None = None
) -> Path:
    """Makes the run `out` of a Hugging Face folder or a GGUF file.

    Args:
      weight: what the block matrices are: float, or scale times ternary or binary codes.
      scale_shards: scales per matrix, where they are quantized.
      tokenizer: a tokenizer.json to take in place of the model's own.

    Raises:
      UserError: a model that is not Llama-shaped, files that are missing or damaged, matrices that do not hold such
        codes, or `out` exists.
    """
    path, out = Path(path), Path(out)
    one_of(weight, FAMILIES, "--weight")
    refuse_existing(out)
    with ExitStack() as files:
        source = open_file(path, tokenizer) if path.suffix == ".gguf" else open_folder(path, files, tokenizer)
        Tokenizer(source.tokenizer, name=source.name)  # refuses what cannot be used
        config = check(Config(
            family=FAMILIES[weight], name=source.name, train=Train(steps=1),
            model=replace(source.model, weight=weight, scale_shards=scale_shards),
            data=Data(T=min(source.context, T_LIMIT), batch=jax.device_count()),
        ))
        mesh = make_mesh(config)
        with jax.set_mesh(mesh):
            like = abstract(jax.eval_shape(partial(init_parameters, config.model), jax.random.key(0)), mesh)
            parameters = _read_parameters(config.model, source, like)
            if unread := source.unread():
                raise UserError(
                    f"{path} has {len(unread)} tensors that this model has no place for: {', '.join(unread[:4])}"
                    f"{', ...' if len(unread) > 4 else ''}; without them it would not be the same model"
                )
            if weight != "float":
                parameters = _recover(config.model, parameters)
            content = make_record(configs.to_dict(config), source.tokens, "") | {"imported": source.name}
            write_made(out, config, parameters, content, source.tokenizer)
    return out


def _read_parameters(m: Model, source: Source, like: PyTree) -> PyTree:
    """Every array in place, in float32."""

    def read(leaf: jax.ShapeDtypeStruct, names: list[str], *, transposed: bool, stacked: bool) -> Array:
        slices = [source.tensor(name) for name in names]
        shape = leaf.shape[1:] if stacked else leaf.shape
        for name, each in zip(names, slices):
            found = tuple(each.get_shape())
            if found != (shape[::-1] if transposed else shape):
                raise UserError(f"{name} is {found}; the model's shape makes it {shape[::-1] if transposed else shape}")

        def part(index: tuple[slice, ...]) -> np.ndarray:
            chosen, inner = (slices[index[0]], index[1:]) if stacked else (slices, index)
            parts = [np.asarray(each[inner[::-1] if transposed else inner], np.float32) for each in chosen]
            parts = [each.T if transposed else each for each in parts]
            return np.stack(parts) if stacked else parts[0]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    blocks, layers = like["blocks"], [f"model.layers.{k}." for k in range(m.L)]
    read_blocks = {
        ours: {"gain": read(
            blocks[ours]["gain"], [f"{layer}{theirs}.weight" for layer in layers], transposed=False, stacked=True
        )} for ours, theirs in NORMS.items()
    } | {module: {} for module in THEIRS}
    for module, name in MATRICES:
        theirs = [f"{layer}{THEIRS[module].format(name)}.weight" for layer in layers]
        read_blocks[module][name] = {"w": read(blocks[module][name]["w"], theirs, transposed=True, stacked=True)}
    one = partial(read, stacked=False)
    parameters = {
        "embedding": one(like["embedding"], ["model.embed_tokens.weight"], transposed=False),
        "blocks": read_blocks,
        "norm": {"gain": one(like["norm"]["gain"], ["model.norm.weight"], transposed=False)},
    }
    if not m.tie_embeddings:
        parameters["head"] = one(like["head"], ["lm_head.weight"], transposed=True)
    return parameters


@partial(jax.jit, static_argnums=(1, 2))
def _codes_and_scales(w: Array, shards: Shards, weight: str) -> tuple[Frozen, Array]:
    """Of stacked matrices, and how many weights of each layer are not scale times code."""
    rule = get_rule(weight)

    def one(matrix: Array) -> tuple[Frozen, Array]:
        line = jnp.max(jnp.abs(matrix), axis=1 - shards.axis)
        scales = jnp.max(jax.sharding.reshard(line, jax.P()).reshape(shards.count, -1), axis=1)
        codes = jnp.round(matrix / expand(jnp.where(scales == 0, 1, scales), matrix.shape, shards.axis))
        frozen = Frozen(codes.astype(jnp.int8), scales, shards.axis, rule.code_bits, rule.paper_bits)
        return frozen, jnp.sum(frozen.dequantize() != matrix)

    return jax.vmap(one)(w)


def _recover(m: Model, parameters: dict) -> dict:
    """Codes and scales of every block matrix, which are those it was made of to the last bit."""
    blocks = {name: dict(node) for name, node in parameters["blocks"].items()}
    for module, name in MATRICES:
        w = blocks[module][name]["w"]
        frozen, wrong = _codes_and_scales(w, shards_of(m, (module, name)), m.weight)
        zeros = jnp.sum(frozen.codes == 0, axis=(1, 2)) if m.weight == "binary" else 0
        wrong = np.asarray(wrong + zeros)
        if wrong.any():
            layer = int(np.argmax(wrong > 0))
            raise UserError(
                f"{THEIRS[module].format(name)} of layer {layer} is not {m.weight}: {wrong[layer]:,} of "
                f"{w[0].size:,} weights are no code times the largest magnitude of their shard "
                f"(--scale-shards={m.scale_shards}); import it with --weight=float, or another --scale-shards"
            )
        blocks[module][name] = {"w": frozen}
    return {**parameters, "blocks": blocks}
