"""Llama as other people's formats see it: the names of its tensors, and a model that can be imported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spectra_jax.errors import UserError
from spectra_jax.model.parameters import block_matrices
from spectra_jax.schema import Model
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import is_form

# Our names to those of transformers, after "model.layers.K.".
THEIRS = {"attention": "self_attn.{}_proj", "mlp": "mlp.{}_proj"}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def refuse_other_models(m: Model, parameters: dict, out: str) -> None:
    """What Llama's code does not run.

    Raises:
      UserError: saying what, and what can be done with such a model.
    """
    rule, forms, other = get_rule(m.weight), filter(is_form, block_matrices(parameters).values()), ""
    if m.mixer != "attention":
        other = f"the mixer {m.mixer} is a recurrence in the place of attention"
    elif rule.normalises_input:
        other = f"{m.weight} normalises and quantizes the input of every matrix and has no norms before its blocks"
    elif any(form.core is not form for form in forms):
        other = f"{m.weight} has a norm before every matrix"
    elif m.quantized_head:
        other = "the head is quantized (config.model.quantized_head)"
    if other:
        raise UserError(f"{other}, which Llama's code does not know: such a model can be evaluated and sampled here, "
                        f"but not exported as {out}")


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
