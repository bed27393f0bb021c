"""A Hugging Face folder of Llama's shape, to be imported: config.json, safetensors files, tokenizer.json."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spectra_jax.errors import UserError
from spectra_jax.interop.llama import Source
from spectra_jax.schema import Model


def open_folder(folder: Path, files: ExitStack, tokenizer: str | None = None) -> Source:
    """Opens it; `files` closes it. `tokenizer` is a tokenizer.json to take in place of its own.

    Raises:
      UserError: a model that is not Llama-shaped, or files that are missing or damaged.
    """
    theirs = _read_json(folder / "config.json")
    tensor, unread = _open(folder, files)
    return Source(
        name=folder.name, model=model_of(theirs), context=theirs.get("max_position_embeddings", 2048),
        tokens=theirs.get("spectra_jax", {}).get("tokens"),
        tokenizer=json.dumps(_read_json(Path(tokenizer) if tokenizer else folder / "tokenizer.json")),
        tensor=tensor, unread=unread,
    )


def model_of(theirs: Mapping[str, Any]) -> Model:
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
            K=theirs.get("num_key_value_heads") or N, H=theirs.get("head_dim") or D // N,
            rope_base=float(rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))),
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


def _open(folder: Path, files: ExitStack) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`tensor` and `unread` of a `Source`."""
    index = folder / "model.safetensors.index.json"
    names = set(_read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    where, asked = {}, set()
    for name in sorted(names):
        try:
            file = files.enter_context(safe_open(folder / name, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {folder / name}: {error}; download it again") from error
        where |= dict.fromkeys(file.keys(), file)

    def tensor(name: str) -> Any:
        if name not in where:
            raise UserError(f"{folder} has no tensor {name}; it has {len(where)} others")
        asked.add(name)
        return where[name].get_slice(name)

    def unread() -> list[str]:
        # A tied head may be stored beside the embedding, and old files hold the frequencies of the rotary embedding.
        return sorted(name for name in where.keys() - asked if not name.endswith(("lm_head.weight", "inv_freq")))

    return tensor, unread
