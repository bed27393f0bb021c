"""Llama as other people's formats see it: the names of its tensors, and a model that can be imported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spectra_jax.schema import Model

# Our names to those of transformers, after "model.layers.K.".
THEIRS = {"attention": "self_attn.{}_proj", "mlp": "mlp.{}_proj"}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Source:
    """A model in files.

    tensor: by transformers' name, an array (out, in) that is read when it is sliced.
    unread: the names of tensors, as they stand in the files, that have not been asked for.
    """

    name: str
    model: Model
    context: int  # tokens that it was made for
    tokens: int | None  # that it was trained on, if it says so
    tokenizer: str  # the text of a tokenizer.json
    tensor: Callable[[str], Any]
    unread: Callable[[], list[str]]
