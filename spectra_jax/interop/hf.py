"""A checkpoint as a Hugging Face folder: transformers' Llama and its tokenizer load it, with no code of ours.

A quantized matrix is written as scale times code, unpacked, or a QuantLM's as GPTQ checkpoints have it. The folder says
in config.json, under "spectra_jax", which checkpoint it was made of; exported again by the same software, the same
checkpoint gives the same bytes.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from spectra_jax.errors import UserError, one_of
from spectra_jax.interop import gptq_format
from spectra_jax.interop.llama import NORMS, THEIRS, refuse_other_models
from spectra_jax.made import refuse_existing
from spectra_jax.model.matrices import MATRICES
from spectra_jax.model.parameters import block_matrices
from spectra_jax.schema import Model
from spectra_jax.serve.load import Loaded, load
from spectra_jax.weights.form import Form
from spectra_jax.weights.grid import Grid

DTYPES = ("float32", "bfloat16", "float16")
FILE_BYTES = 4 << 30  # tensors per file, as the hub likes them


def export(checkpoint: str, out: Path | str, *, dtype: str = "float32", packed: bool = False) -> Path:
    """Writes `WORKDIR[@STEP]` to the folder `out`, which appears whole or not at all.

    Args:
      dtype: of everything that is not packed.
      packed: matrices as in GPTQ checkpoints (gptq_format.py).

    Raises:
      UserError: no such checkpoint, a family that Llama's code cannot run, or `out` is there already.
    """
    one_of(dtype, DTYPES, "--dtype")
    out = Path(out)
    refuse_existing(out)
    # On one device of the host: over several, the sums behind the scales would be taken in another order.
    loaded = load(checkpoint, devices=jax.local_devices(backend="cpu")[:1])
    refuse_other_models(loaded.config.model, loaded.parameters, "Llama")
    if not packed:
        _refuse_rounded_activations(loaded)
    elif not all(isinstance(w, Grid) for w in block_matrices(loaded.parameters).values()):
        raise UserError(f"{checkpoint} has no matrices on uniform grids to pack; export it with --to=hf")
    half = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        _write_tensors(loaded, half, dtype, packed)
        _write_json(half / "config.json", _config(loaded, dtype, packed))
        _write_json(half / "generation_config.json", {"eos_token_id": loaded.tokenizer.eod})
        _write_tokenizer(loaded, half)
        half.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; free some space or use another --out") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return out


def _refuse_rounded_activations(loaded: Loaded) -> None:
    if any(getattr(w, "tokens8", False) for w in block_matrices(loaded.parameters).values()):
        raise UserError(
            f"{loaded.config.quantize.method} rounds activations to 8 bits, which Llama's code does not do: such a "
            "model can be evaluated and sampled here, but not exported as Llama"
        )


def tensors(m: Model, parameters: dict, packed: bool = False) -> Iterator[tuple[str, Array]]:
    """Every tensor with its name in transformers' Llama, in the order of the layers, one at a time."""
    yield "model.embed_tokens.weight", parameters["embedding"]
    blocks = parameters["blocks"]
    for layer in range(m.L):
        prefix = f"model.layers.{layer}."
        for ours, theirs in NORMS.items():
            yield f"{prefix}{theirs}.weight", blocks[ours]["gain"][layer]
        for module, name in MATRICES:
            one = jax.tree.map(itemgetter(layer), blocks[module][name]["w"])
            theirs = f"{prefix}{THEIRS[module].format(name)}"
            if packed:
                parts = gptq_format.packed(one, theirs)
                yield from ((f"{theirs}.{part}", tensor) for part, tensor in parts.items())
            else:
                one = one.dequantize() if isinstance(one, Form) else one
                yield f"{theirs}.weight", one.T  # theirs are (out, in)
    yield "model.norm.weight", parameters["norm"]["gain"]
    if not m.tie_embeddings:
        yield "lm_head.weight", parameters["head"].T


def _write_tensors(loaded: Loaded, folder: Path, dtype: str, packed: bool) -> None:
    """Files of at most FILE_BYTES (or one tensor), and their index where there are several."""
    files: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        # No more metadata than this: safetensors writes several entries in an order that changes from run to run.
        save_file(held, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors(loaded.config.model, loaded.parameters, packed):
        # What is a numpy array is packed, and has the dtype that it must have.
        tensor = np.ascontiguousarray(tensor if isinstance(tensor, np.ndarray) else jnp.asarray(tensor, dtype))
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > FILE_BYTES:
            flush()
        held[name] = tensor
    flush()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    where = {}
    for k, names in enumerate(files):
        final = f"model-{k + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{k}.safetensors").rename(folder / final)
        where |= dict.fromkeys(names, final)
    total = sum(size for names in files for size in names.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _config(loaded: Loaded, dtype: str, packed: bool) -> dict:
    m, record = loaded.config.model, loaded.record
    sums = json.dumps(record["arrays"]["parameters"], sort_keys=True)
    form = {}
    if packed:
        grid = block_matrices(loaded.parameters)["mlp", "up"]
        form = {"quantization_config": gptq_format.config_of(grid, loaded.config.quantize)}
    return form | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "vocab_size": m.V,
        "hidden_size": m.D, "intermediate_size": m.F, "num_hidden_layers": m.L, "num_attention_heads": m.N,
        "num_key_value_heads": m.K, "head_dim": m.H, "hidden_act": "silu", "rms_norm_eps": m.norm_eps,
        # Versions of transformers before 5 read the first of these, later ones the second.
        "rope_theta": m.rope_base, "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_base},
        "tie_word_embeddings": m.tie_embeddings, "attention_bias": False, "mlp_bias": False,
        "max_position_embeddings": loaded.config.data.T, "initializer_range": m.init_std, "use_cache": True,
        "bos_token_id": None, "eos_token_id": loaded.tokenizer.eod, "pad_token_id": None,
        "spectra_jax": {
            "family": loaded.config.family, "weight": m.weight, "step": loaded.step, "tokens": record["tokens"],
            "checksums_of_parameters": hashlib.sha256(sums.encode()).hexdigest(),
            "data_fingerprint": record["data_fingerprint"], "git_commit": record["git_commit"],
        },
    }


def _write_tokenizer(loaded: Loaded, folder: Path) -> None:
    loaded.tokenizer.save(folder / "tokenizer.json")
    eod = loaded.tokenizer.decode([loaded.tokenizer.eod])
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod, "clean_up_tokenization_spaces": False,
        "model_max_length": loaded.config.data.T,
    })


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
