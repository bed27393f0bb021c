"""A checkpoint as a GGUF file, which llama.cpp and the programs around it run.

TQ2_0 and TQ1_0 hold ternary and binary matrices in blocks of 256 inputs of one output: the codes exactly, in 2 or 1.6
bits, and a scale in float16. Every other type holds what a matrix stands for, rounded: F32 not at all, F16 to float16,
Q8_0 to 8 bits with a float16 scale per 32 inputs. `spectra import` makes a run of the file again, with the weights as
the file holds them, which is how the effect of the rounding is evaluated.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from math import ceil, prod
from pathlib import Path

import jax
import numpy as np
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, quantize
from gguf import GGMLQuantizationType as Type
from jaxtyping import Float, PyTree

from spectra_jax.errors import UserError, one_of
from spectra_jax.interop.gguf_source import NAMES
from spectra_jax.interop.gguf_vocabulary import Vocabulary, vocabulary_of
from spectra_jax.interop.hf import tensors
from spectra_jax.interop.llama import refuse_other_models
from spectra_jax.made import refuse_existing
from spectra_jax.model.parameters import block_matrices, with_matrices
from spectra_jax.schema import Model
from spectra_jax.serve.load import Loaded, load
from spectra_jax.stored import parse_checkpoint
from spectra_jax.weights.frozen import Frozen

PLAIN = ("Q8_0", "F16", "F32")
TERNARY = ("TQ2_0", "TQ1_0")
FILE_TYPES = {
    "TQ2_0": LlamaFileType.MOSTLY_TQ2_0, "TQ1_0": LlamaFileType.MOSTLY_TQ1_0, "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "F16": LlamaFileType.MOSTLY_F16, "F32": LlamaFileType.ALL_F32,
}


def export(
    checkpoint: str, out: Path | str, *, matrices: str = "TQ2_0", embedding: str = "Q8_0", head: str = "Q8_0"
) -> str:
    """Writes `WORKDIR[@STEP]` to the file `out`, which appears whole or not at all.

    Args:
      matrices: the type of the matrices of the blocks.
      embedding: the type of the embedding, which is the head too where they are tied.
      head: the type of the head.

    Returns:
      What was written, and what it changed, in lines to print.

    Raises:
      UserError: no such checkpoint, a model that llama.cpp cannot run, a type that does not hold it, or `out` exists.
    """
    types = {
        "--type": one_of(matrices, TERNARY + PLAIN, "--type"),
        "--embedding-type": one_of(embedding, PLAIN, "--embedding-type"),
        "--head-type": one_of(head, PLAIN, "--head-type"),
    }
    out = Path(out)
    refuse_existing(out)
    loaded = load(checkpoint, devices=jax.local_devices(backend="cpu")[:1])
    parameters, notes = loaded.parameters, []
    m, tokenizer = loaded.config.model, parse_checkpoint(checkpoint)[0] / "tokenizer.json"
    _refuse_other_models(checkpoint, loaded, matrices)
    vocabulary = vocabulary_of(tokenizer.read_text("utf-8"), m.V)
    if vocabulary.normalises:
        notes.append("llama.cpp does not normalise text: what is not in NFC is tokenized otherwise there")
    if matrices in TERNARY:
        parameters, change = snapped(parameters)
        shared = _shared_blocks(parameters)
        weight = "float" if shared else f"{m.weight} --scale-shards={m.scale_shards}"
        notes += [
            f"scales in float16: changed by {change:.1e} of their value at most", *shared,
            f"a run of it, to evaluate: spectra import {out} --weight={weight} --tokenizer={tokenizer} --out=RUN",
        ]
    plan = _plan(m, parameters, types)
    half = out.with_name(f".{out.name}.part")
    try:
        half.parent.mkdir(parents=True, exist_ok=True)
        _write(half, loaded, parameters, plan, vocabulary, FILE_TYPES[matrices])
        half.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; free some space or use another --out") from error
    finally:
        if half.is_file():
            half.unlink()
    top = f"embedding and head {embedding}" if "head" not in parameters else f"embedding {embedding}, head {head}"
    return "\n".join([f"{out}: {out.stat().st_size / 1e6:,.1f} MB, matrices {matrices}, {top}", *notes])


def snapped(parameters: dict) -> tuple[dict, float]:
    """The parameters with every scale of ternary and binary matrices rounded to float16, and the largest change.

    The change is relative to the scale. Any other matrix stays as it is.

    Raises:
      UserError: a scale that float16 does not have.
    """
    found, change = {}, 0.0
    for key, w in block_matrices(parameters).items():
        if isinstance(w, Frozen):
            exact = np.asarray(w.scales)
            with np.errstate(over="ignore"):
                half = exact.astype(np.float16).astype(np.float32)
            if lost := exact[((half == 0) != (exact == 0)) | ~np.isfinite(half)].tolist():
                raise UserError(f"{'.'.join(key)} has a scale of {lost[0]:.1e}, and float16 reaches from 6.0e-08 to "
                                "65,504: choose --type=F32")
            change = max(change, float(np.max(np.abs(half - exact) / np.where(exact == 0, 1, exact))))
            found[key] = replace(w, scales=jax.device_put(half, w.scales.sharding))
    return {**parameters, "blocks": with_matrices(parameters["blocks"], found)}, change


def _refuse_other_models(checkpoint: str, loaded: Loaded, matrices: str) -> None:
    """What is no Llama, or what the type of the matrices does not hold."""
    m, ws = loaded.config.model, block_matrices(loaded.parameters).values()
    refuse_other_models(m, loaded.parameters, "GGUF")
    if any(getattr(w, "tokens8", False) for w in ws):
        raise UserError(
            f"{loaded.config.quantize.method} rounds activations to 8 bits in its own way: such a model can be "
            "evaluated and sampled here, but not exported as GGUF"
        )
    if matrices in TERNARY and (others := {type(w).__name__ for w in ws if not isinstance(w, Frozen)}):
        kind = "float" if loaded.config.quantize.method == "none" else f"quantized otherwise ({', '.join(others)})"
        raise UserError(
            f"{matrices} holds ternary and binary matrices, and those of {checkpoint} are {kind}: choose --type=F16 "
            "or Q8_0, or export a run whose weights are ternary or binary"
        )


def _shared_blocks(parameters: dict) -> list[str]:
    """A line for every kind of matrix whose blocks are not each within one shard, with the error that this makes.

    Such a block has the largest of its scales. A code of a smaller one then stands for more than it should, or for
    nothing where that scale is less than half the largest.
    """
    block, notes = GGML_QUANT_SIZES[Type.TQ2_0][0], []
    for (module, name), w in block_matrices(parameters).items():
        size, rows = w.codes.shape[1] // w.scales.shape[1], w.codes.shape[1]
        if w.axis != 0 or size % block == 0 or w.scales.shape[1] == 1:
            continue
        scales, worst, shared = np.asarray(w.scales), 0.0, 0
        for start in range(0, rows, block):
            inside = scales[:, start // size : ceil((start + block) / size)]
            shared += inside.shape[1] > 1
            largest = inside.max(axis=1, keepdims=True)
            error = np.where(inside >= largest / 2, largest / np.where(inside == 0, 1, inside) - 1, 1.0)
            worst = max(worst, float(np.max(np.where(inside == 0, 0, error))))
        notes.append(
            f"{module}.{name}: scales are for {size} inputs, so {shared} of {rows // block} blocks of {block} hold "
            f"two, and keep the larger: weights in them change by {worst:.1e} of their value at most"
        )
    return notes


def _plan(m: Model, parameters: PyTree, types: Mapping[str, str]) -> dict[str, tuple[str, Type, tuple[int, ...]]]:
    """Of every tensor, by transformers' name and in the order of `tensors`: llama.cpp's name, its type and its shape.

    Raises:
      UserError: rows that are not whole blocks of the type.
    """
    plan, names = {}, []

    def arrays(parameters: PyTree) -> list[jax.Array]:
        found = dict(tensors(m, parameters))
        names.extend(found)
        return list(found.values())

    shapes = jax.eval_shape(arrays, parameters)  # a dict would come back in the order of its keys
    for name, tensor in zip(names, shapes):
        option = {"model.embed_tokens.weight": "--embedding-type", "lm_head.weight": "--head-type"}.get(name, "--type")
        kind = Type[types[option]] if tensor.ndim > 1 else Type.F32  # norms are never quantized
        if tensor.shape[-1] % GGML_QUANT_SIZES[kind][0]:
            fits = [other for other in PLAIN if tensor.shape[-1] % GGML_QUANT_SIZES[Type[other]][0] == 0]
            raise UserError(
                f"{name} has rows of {tensor.shape[-1]} weights, and {kind.name} has blocks of "
                f"{GGML_QUANT_SIZES[kind][0]}: choose {option}={' or '.join(fits)}"
            )
        plan[name] = (_their_name(name), kind, tensor.shape)
    return plan


def _their_name(name: str) -> str:
    stem, layer = name.removesuffix(".weight"), ""
    if stem.startswith("model.layers."):
        number, stem = stem.removeprefix("model.layers.").split(".", 1)
        layer = f"blk.{number}."
    return f"{layer}{NAMES[stem]}.weight"


def turned(w: Float[np.ndarray, "n m"], heads: int) -> Float[np.ndarray, "n m"]:
    """The rows of q or k in llama.cpp's order: dim p H/2 + j of a head comes at 2j + p (see gguf_source.Rows)."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def _write(
    path: Path, loaded: Loaded, parameters: PyTree, plan: Mapping, vocabulary: Vocabulary, file_type: LlamaFileType
) -> None:
    m = loaded.config.model
    file = GGUFWriter(path, "llama")
    _add_fields(file, loaded, file_type)
    vocabulary.add_to(file, loaded.tokenizer.eod)
    for name, kind, shape in plan.values():
        weights, bytes_ = GGML_QUANT_SIZES[kind]
        file.add_tensor_info(name, shape, np.dtype(np.float32), prod(shape) // weights * bytes_, kind)
    try:
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        heads = {"self_attn.q_proj.weight": m.N, "self_attn.k_proj.weight": m.K}
        for name, tensor in tensors(m, parameters):
            tensor = np.asarray(tensor, np.float32)
            count = next((n for end, n in heads.items() if name.endswith(end)), None)
            tensor = turned(tensor, count) if count else tensor
            file.write_tensor_data(quantize(np.ascontiguousarray(tensor), plan[name][1]))
    finally:
        file.close()


def _add_fields(file: GGUFWriter, loaded: Loaded, file_type: LlamaFileType) -> None:
    """Everything but the vocabulary: what llama.cpp needs, and which checkpoint this is."""
    c, m, record = loaded.config, loaded.config.model, loaded.record
    file.add_name(c.name or c.family)
    file.add_file_type(file_type)
    file.add_quantization_version(GGML_QUANT_VERSION)
    file.add_vocab_size(m.V)
    file.add_context_length(c.data.T)
    file.add_embedding_length(m.D)
    file.add_block_count(m.L)
    file.add_feed_forward_length(m.F)
    file.add_head_count(m.N)
    file.add_head_count_kv(m.K)
    file.add_key_length(m.H)
    file.add_value_length(m.H)
    file.add_rope_dimension_count(m.H)
    file.add_rope_freq_base(m.rope_base)
    file.add_layer_norm_rms_eps(m.norm_eps)
    sums = json.dumps(record["arrays"]["parameters"], sort_keys=True)
    file.add_string("spectra_jax.family", c.family)
    file.add_string("spectra_jax.weight", m.weight)
    file.add_uint64("spectra_jax.step", loaded.step)
    file.add_string("spectra_jax.checksums_of_parameters", hashlib.sha256(sums.encode()).hexdigest())
