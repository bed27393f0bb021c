"""A checkpoint as a Hugging Face folder: transformers' Llama and its tokenizer load it, with no code of ours.

A quantized matrix is written as scale times code, unpacked. The folder says in config.json, under "spectra_jax", which
checkpoint it was made of; exported again by the same software, the same checkpoint gives the same bytes.
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
from spectra_jax.interop.llama import NORMS, THEIRS
from spectra_jax.made import refuse_existing
from spectra_jax.model.matrices import MATRICES
from spectra_jax.schema import Model
from spectra_jax.serve.load import Loaded, load
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import Form

DTYPES = ("float32", "bfloat16", "float16")
FILE_BYTES = 4 << 30  # tensors per file, as the hub likes them


def export(checkpoint: str, out: Path | str, *, dtype: str = "float32") -> Path:
    """Writes `WORKDIR[@STEP]` to the folder `out`, which appears whole or not at all.

    Raises:
      UserError: no such checkpoint, a family that Llama's code cannot run, or `out` is there already.
    """
    one_of(dtype, DTYPES, "--dtype")
    out = Path(out)
    refuse_existing(out)
    # On one device of the host: over several, the sums behind the scales would be taken in another order.
    loaded = load(checkpoint, devices=jax.local_devices(backend="cpu")[:1])
    m = loaded.config.model
    if get_rule(m.weight).normalises_input:
        raise UserError(
            f"{m.weight} normalises and quantizes the input of every matrix, which Llama's code does not do: such a "
            "model can be evaluated and sampled here, but not exported as Llama"
        )
    half = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        _write_tensors(loaded, half, dtype)
        _write_json(half / "config.json", _config(loaded, dtype))
        _write_json(half / "generation_config.json", {"eos_token_id": loaded.tokenizer.eod})
        _write_tokenizer(loaded, half)
        half.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; free some space or use another --out") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return out


def tensors(m: Model, parameters: dict) -> Iterator[tuple[str, Array]]:
    """Every tensor with its name in transformers' Llama, in the order of the layers, one at a time."""
    yield "model.embed_tokens.weight", parameters["embedding"]
    blocks = parameters["blocks"]
    for layer in range(m.L):
        prefix = f"model.layers.{layer}."
        for ours, theirs in NORMS.items():
            yield f"{prefix}{theirs}.weight", blocks[ours]["gain"][layer]
        for module, name in MATRICES:
            one = jax.tree.map(itemgetter(layer), blocks[module][name]["w"])
            one = one.dequantize() if isinstance(one, Form) else one
            yield f"{prefix}{THEIRS[module].format(name)}.weight", one.T  # theirs are (out, in)
    yield "model.norm.weight", parameters["norm"]["gain"]
    if not m.tie_embeddings:
        yield "lm_head.weight", parameters["head"].T


def _write_tensors(loaded: Loaded, folder: Path, dtype: str) -> None:
    """Files of at most FILE_BYTES (or one tensor), and their index where there are several."""
    files: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        # No more metadata than this: safetensors writes several entries in an order that changes from run to run.
        save_file(held, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors(loaded.config.model, loaded.parameters):
        tensor = np.ascontiguousarray(jnp.asarray(tensor, dtype))
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


def _config(loaded: Loaded, dtype: str) -> dict:
    m, record = loaded.config.model, loaded.record
    sums = json.dumps(record["arrays"]["parameters"], sort_keys=True)
    return {
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
