"""Parameters as decoding wants them: a block's arrays apart from the other blocks', matrices as they are multiplied.

Training keeps the blocks stacked and scans over them. A step of decoding does little but read every weight once, and
cutting one layer's weights out of a stack costs another read and a write of them: it took twice as long.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from spectra_jax.model.parameters import freeze
from spectra_jax.model.transformer import compute_dtype
from spectra_jax.schema import Model
from spectra_jax.weights.form import Form, form, is_form, static


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Dense(Form):
    """The effective matrix of a form in the compute dtype, and what the form does to its input."""

    values: Float[Array, "*L m n"]
    of: Form = static()  # the form without its arrays

    def dequantize(self) -> Float[Array, "m n"]:
        """The matrix, whatever its dtype."""
        return self.values

    def activation(self, x):
        """That of the form."""
        return self.of.activation(x)


def by_layer(m: Model, parameters: PyTree, *, release: bool = False) -> PyTree:
    """The parameters with a tuple of L arrays or forms for each stacked one, which `Transformer.layer` takes.

    Latent matrices are frozen. Forms become dense matrices in the compute dtype, once and not at every step, unless
    they have a product of their own; so do embedding and head.

    Args:
      release: gives up the memory of each array once its successors are there; `parameters` are gone then.
    """
    if not any(map(is_form, jax.tree.leaves(parameters, is_leaf=is_form))):
        parameters = freeze(m, parameters)
    cut, dtype = jax.jit(_layer, static_argnums=2), compute_dtype(m)

    def apart(path: tuple, stacked: Array | Form) -> tuple[Array | Form, ...]:
        found = tuple(cut(stacked, i, dtype if path[-1].key == "w" else None) for i in range(m.L))
        if release:
            jax.block_until_ready(found)
            jax.tree.map(lambda x: x.delete(), stacked)
        return found

    blocks = jax.tree_util.tree_map_with_path(apart, parameters["blocks"], is_leaf=is_form)
    rest = {name: _ready(parameters[name], dtype) for name in ("embedding", "head") if name in parameters}
    return {**parameters, **rest, "blocks": blocks}


def _layer(stacked: Array | Form, i: int | Array, dtype: jnp.dtype | None) -> Array | Form:
    """One layer's; a matrix ready to multiply if a dtype is given."""
    return _ready(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), stacked), dtype)


def _ready(w: Array | Form, dtype: jnp.dtype | None) -> Array | Form:
    if is_form(w) and type(core := w.core).product is Form.product:
        return w.with_core(Dense(core.dequantize().astype(dtype), jax.tree.map(lambda _: None, core)))
    return w if is_form(w) or dtype is None else w.astype(dtype)
