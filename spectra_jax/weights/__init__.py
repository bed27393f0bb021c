"""What a matrix is: one file per weight rule, and the frozen forms.

A new rule is a new file with a `Rule` and a line here.
"""

from spectra_jax.errors import one_of
from spectra_jax.weights import codebook, grid, masked, tables  # noqa: F401  (a checkpoint names its forms)
from spectra_jax.weights.binary import Binary
from spectra_jax.weights.bitlinear import BitLinear
from spectra_jax.weights.bitnet158 import BitNet158
from spectra_jax.weights.float import Float
from spectra_jax.weights.rule import Rule
from spectra_jax.weights.ternary import Ternary

RULES: dict[str, Rule] = {rule.name: rule for rule in (Float(), Ternary(), Binary(), BitNet158(), BitLinear())}


def get_rule(name: str) -> Rule:
    """The weight rule of this name.

    Raises:
      UserError: there is none; the message names the nearest.
    """
    return RULES[one_of(name, RULES, "config.model.weight")]
