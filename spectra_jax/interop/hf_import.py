"""A Hugging Face folder of Llama's shape as a run of ours, which every command takes like one that was trained here.

Each device reads its own part of each tensor, straight from the files. A matrix that holds scale times code already,
as released TriLMs do, is taken apart exactly: its scale is the largest magnitude of the shard. (To take the mean
magnitude again, as training does, would shrink the scale by the share of zeros.)
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from safetensors import SafetensorError, safe_open

from spectra_jax import config as configs
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.errors import UserError, one_of
from spectra_jax.interop.hf import NORMS, THEIRS
from spectra_jax.model.matrices import MATRICES, shards_of
from spectra_jax.model.parameters import init_parameters
from spectra_jax.record import make_record
from spectra_jax.schema import Checkpoint, Config, Data, Model, Train, check
from spectra_jax.sharding import make_mesh
from spectra_jax.stored import abstract
from spectra_jax.train.workdir import write_run
from spectra_jax.weights.frozen import Frozen, expand
from spectra_jax.weights.rule import Shards

FAMILIES = {"float": "FloatLM", "ternary": "TriLM", "binary": "BiLM"}
T_LIMIT = 2048  # a longer context is a choice, not a default: evaluation pays for it


def import_folder(folder: Path | str, out: Path | str, *, weight: str = "float", scale_shards: int = 1) -> Path:
    """Makes the run `out` of a folder with config.json, safetensors files and tokenizer.json.

    Args:
      weight: what the block matrices are: float, or scale times ternary or binary codes.
      scale_shards: scales per matrix, where they are quantized.

    Raises:
      UserError: a model that is not Llama-shaped, files that are missing or damaged, matrices that do not hold such
        codes, or `out` exists.
    """
    folder, out = Path(folder), Path(out)
    one_of(weight, FAMILIES, "weight")
    if out.exists():
        raise UserError(f"{out} exists; an import never replaces anything: name another --out, or remove it")
    theirs = _read_json(folder / "config.json")
    model = model_of(theirs, weight, scale_shards)
    config = check(Config(
        family=FAMILIES[weight], name=folder.name, model=model, train=Train(steps=1), checkpoint=Checkpoint(),
        data=Data(T=min(theirs.get("max_position_embeddings", T_LIMIT), T_LIMIT), batch=jax.device_count()),
    ))
    tokenizers.load(str(folder / "tokenizer.json"))  # refuses what cannot be used
    tokenizer = (folder / "tokenizer.json").read_text("utf-8")
    mesh = make_mesh(config)
    with jax.set_mesh(mesh), ExitStack() as files:
        like = abstract(jax.eval_shape(partial(init_parameters, model), jax.random.key(0)), mesh)
        parameters = _read_parameters(model, _open(folder, files), like)
        if weight != "float":
            parameters = _recover(model, parameters)
        content = make_record(configs.to_dict(config), theirs.get("spectra_jax", {}).get("tokens"), "")
        half = out.with_name(f".{out.name}.part")
        shutil.rmtree(half, ignore_errors=True)
        try:
            write_run(half, config, fingerprint="", tokenizer=tokenizer)
            with Checkpoints(half, config) as checkpoints:
                checkpoints.save(0, {"parameters": parameters}, {**content, "imported": folder.name})
            half.rename(out)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return out


def model_of(theirs: Mapping[str, Any], weight: str, scale_shards: int) -> Model:
    """The shape that a config.json describes.

    Raises:
      UserError: it is not Llama's, or something in it has no counterpart here.
    """
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    wanted = {
        "model_type": ("llama", theirs.get("model_type")),
        "hidden_act": ("silu", theirs.get("hidden_act", "silu")),
        "attention_bias": (False, theirs.get("attention_bias", False)),
        "mlp_bias": (False, theirs.get("mlp_bias", False)),
        "rope_type": ("default", rope.get("rope_type", rope.get("type", "default"))),
    }
    faults = [f"{key}={found!r} (only {ours!r} is known)" for key, (ours, found) in wanted.items() if found != ours]
    if faults:
        raise UserError("config.json: this model cannot be run here: " + ", ".join(faults))
    try:
        D, N = theirs["hidden_size"], theirs["num_attention_heads"]
        return Model(
            V=theirs["vocab_size"], D=D, F=theirs["intermediate_size"], L=theirs["num_hidden_layers"], N=N,
            K=theirs.get("num_key_value_heads") or N, H=theirs.get("head_dim") or D // N, weight=weight,
            scale_shards=scale_shards, rope_base=float(rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))),
            norm_eps=theirs["rms_norm_eps"], tie_embeddings=theirs.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise UserError(f"config.json has no {error}") from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; a Hugging Face folder holds config.json, *.safetensors and "
                        "tokenizer.json") from error


def _open(folder: Path, files: ExitStack) -> Callable[[str], Any]:
    """A function from a tensor's name to a slice of it that has not been read yet."""
    index = folder / "model.safetensors.index.json"
    names = set(_read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    where = {}
    for name in sorted(names):
        try:
            file = files.enter_context(safe_open(folder / name, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {folder / name}: {error}; download it again") from error
        where |= dict.fromkeys(file.keys(), file)

    def tensor(name: str) -> Any:
        if name not in where:
            raise UserError(f"{folder} has no tensor {name}; it has {len(where)} others")
        return where[name].get_slice(name)

    return tensor


def _read_parameters(m: Model, tensor: Callable[[str], Any], like: PyTree) -> PyTree:
    """Every array in place, in float32."""

    def read(leaf: jax.ShapeDtypeStruct, names: list[str], *, transposed: bool, stacked: bool) -> Array:
        slices = [tensor(name) for name in names]
        shape = leaf.shape[1:] if stacked else leaf.shape
        for name, each in zip(names, slices):
            found = tuple(each.get_shape())
            if found != (shape[::-1] if transposed else shape):
                raise UserError(f"{name} is {found}; config.json makes it {shape[::-1] if transposed else shape}")

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


@partial(jax.jit, static_argnums=1)
def _codes_and_scales(w: Array, shards: Shards) -> tuple[Frozen, Array]:
    """Of stacked matrices, and how many weights of each layer are not scale times code."""

    def one(matrix: Array) -> tuple[Frozen, Array]:
        line = jnp.max(jnp.abs(matrix), axis=1 - shards.axis)
        scales = jnp.max(jax.sharding.reshard(line, jax.P()).reshape(shards.count, -1), axis=1)
        codes = jnp.round(matrix / expand(jnp.where(scales == 0, 1, scales), matrix.shape, shards.axis))
        frozen = Frozen(codes.astype(jnp.int8), scales, shards.axis)
        return frozen, jnp.sum(frozen.dequantize() != matrix)

    return jax.vmap(one)(w)


def _recover(m: Model, parameters: dict) -> dict:
    """Codes and scales of every block matrix, which are those it was made of to the last bit."""
    blocks = {name: dict(node) for name, node in parameters["blocks"].items()}
    for module, name in MATRICES:
        w = blocks[module][name]["w"]
        frozen, wrong = _codes_and_scales(w, shards_of(m, (module, name)))
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
