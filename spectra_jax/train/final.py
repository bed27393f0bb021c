"""What an optimizer may return in the place of a direction: the values that a parameter takes.

A step along a direction, p - rate * d, cannot return a weight to an earlier value to the last bit. A transformation
that must (spiel.py) wraps the new parameter in `Final`, and has then applied rate and decay itself.
"""

from dataclasses import dataclass

import jax
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Final:
    """The parameter after the step, bit for bit, whatever learning rate and weight decay."""

    value: Array
