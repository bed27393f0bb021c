"""What a matrix is: one file per weight rule, and the frozen forms.

A new rule is a new file with a `Rule` and a line here.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from spectra_jax.errors import UserError, one_of
from spectra_jax.weights import codebook, delta, grid, masked, tables  # noqa: F401  (a checkpoint names its forms)
from spectra_jax.weights.binary import Binary
from spectra_jax.weights.bitlinear import BitLinear
from spectra_jax.weights.bitnet158 import BitNet158
from spectra_jax.weights.dlt import DLT
from spectra_jax.weights.float import Float
from spectra_jax.weights.lrqat import LRQAT
from spectra_jax.weights.rule import Rule
from spectra_jax.weights.sparse import Sparse
from spectra_jax.weights.ternary import Ternary

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (Float(), Ternary(), Binary(), BitNet158(), DLT(), LRQAT(), Sparse(), BitLinear())
}


def get_rule(name: str) -> Rule:
    """The weight rule of this name, which may be followed by settings: "dlt:group=64,threshold=0.5".

    Raises:
      UserError: there is none, or it has no such setting; the message names the nearest.
    """
    base, _, settings = name.partition(":")
    rule = RULES[one_of(base, RULES, "config.model.weight")]
    return replace(rule, **dict(_setting(rule, text) for text in settings.split(","))) if settings else rule


def _setting(rule: Rule, text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    known = {field.name: type(field.default) for field in fields(rule)} if is_dataclass(rule) else {}
    if not known:
        raise UserError(f"config.model.weight={rule.name}:{text}: {rule.name} has no settings")
    kind = known[one_of(key, known, f"a setting of config.model.weight={rule.name}")]
    try:
        return key, {"True": True, "False": False}[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise UserError(f"config.model.weight={rule.name}: {key}={value!r} is not of type {kind.__name__}") from None
