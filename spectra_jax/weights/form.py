"""What a stored matrix is: a pytree of small arrays that knows the matrix it stands for and the bits it takes.

A form takes the place of a latent array in the parameters; the model's code is the same for both. A new form is a
subclass in a file of its own: checkpoints describe and rebuild it by its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

FORMS: dict[str, type["Form"]] = {}
FLOAT_BITS = 16  # of a weight, a gain or an embedding that is not quantized


def static(default: Any = None) -> Any:
    """A field of a form that is no array: part of the structure of the tree."""
    return field(default=default, metadata={"static": True})


class Form:
    """Base of the stored forms. Arrays may be None; leading dims (stacked layers) may stand before all of them."""

    def __init_subclass__(cls):
        FORMS[cls.__name__] = cls

    def dequantize(self) -> Float[Array, "m n"]:
        """The effective matrix (in, out) in float32, of a form without leading dims."""
        raise TypeError(f"{type(self).__name__} does not say what it stands for")

    def activation(self, x: Float[Array, "*B m"]) -> Float[Array, "*B m"]:
        """What the product does to its input first."""
        return x

    @property
    def core(self) -> "Form":
        """The form that multiplies: itself, or the one whose input it changes."""
        return self

    def with_core(self, core: "Form") -> "Form":
        """Itself with another form that multiplies."""
        return core

    def product(self, x: Float[Array, "r m"], spec: jax.sharding.PartitionSpec | None = None) -> Float[Array, "r n"]:
        """x @ dequantize() in the dtype of x; `spec` is where the result goes on a mesh."""
        return jnp.einsum("rm,mn->rn", x, self.dequantize().astype(x.dtype), out_sharding=spec)

    def kinds(self) -> dict[str, str]:
        """Its arrays of whole numbers by what is in them (`packed.py`): they can be stored in fewer bits."""
        return {}

    @property
    def weights(self) -> int:
        """Weights that it stands for, over all leading dims."""
        return self.codes.size

    def stored_bits(self) -> float:
        """Bits of everything it holds, packed as tightly as its kind allows: codes, scales, zeros, maps."""
        raise TypeError(f"{type(self).__name__} does not count its bits")

    def paper_bits(self) -> float:
        """Bits as the publication of the method counts them, which may leave scales and maps out."""
        return self.stored_bits()


def form(cls: type[Form]) -> type[Form]:
    """Makes a subclass a frozen dataclass and a pytree; fields made with `static` are its structure."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))


def is_form(node: Any) -> bool:
    """For `jax.tree` functions that take a form as a leaf."""
    return isinstance(node, Form)


def bits_of(*arrays: Array | jax.ShapeDtypeStruct | None) -> int:
    """Bits of arrays as they are, or of their shapes."""
    return sum(array.size * array.dtype.itemsize * 8 for array in arrays if array is not None)


def describe(parameters: PyTree) -> dict[str, dict]:
    """Every form of a tree by its dotted path, JSON-ready: what `skeleton` needs beside shapes and dtypes."""
    found = {}
    for path, node in jax.tree_util.tree_leaves_with_path(parameters, is_leaf=is_form):
        if is_form(node):
            found[".".join(str(key.key) for key in path)] = _describe(node)
    return found


def _describe(node: Form) -> dict:
    values = {f.name: getattr(node, f.name) for f in fields(node)}
    inner = {name: _describe(value) if is_form(value) else value for name, value in values.items()}
    kept = {f.name for f in fields(node) if f.metadata.get("static") or is_form(values[f.name])}
    return {"form": type(node).__name__, **{name: inner[name] for name in kept}}


def skeleton(
    descriptions: Mapping[str, dict], arrays: Mapping[str, Any], like: PyTree, make: Callable[[list, Any], Any]
) -> PyTree:
    """`like` with every matrix that is described replaced by its form.

    Args:
      descriptions: what `describe` gave.
      arrays: [dtype, shape, ...] of every array by its dotted path.
      like: the parameters of the model before quantization.
      make: a leaf from [dtype, shape, ...] and the leaf of `like` whose place its form takes.
    """

    def build(description: Mapping[str, Any], path: str, leaf: Any) -> Form:
        cls, values = FORMS[description["form"]], {}
        for f in fields(cls):
            where = f"{path}.{f.name}"
            if isinstance(description.get(f.name), Mapping):
                values[f.name] = build(description[f.name], where, leaf)
            elif f.name in description:
                values[f.name] = description[f.name]
            else:
                values[f.name] = make(arrays[where], leaf) if where in arrays else None
        return cls(**values)

    def replace(path: tuple, leaf: Any) -> Any:
        dotted = ".".join(str(key.key) for key in path)
        return build(descriptions[dotted], dotted, leaf) if dotted in descriptions else leaf

    return jax.tree_util.tree_map_with_path(replace, like)


def part_sharding(shape: tuple[int, ...], matrix: Array | jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
    """Where an array of a form is: like the matrix if it has its shape; else it is small, and every device has it."""
    return matrix.sharding if shape == matrix.shape else jax.sharding.NamedSharding(matrix.sharding.mesh, jax.P())


def size_in_bits(parameters: PyTree) -> tuple[float, float]:
    """A model's stored bits, and its bits as papers count them: what is not quantized at 16 bits a value.

    The second leaves the gains of the norms out, as the Spectra paper's Table 4 does.
    """
    stored = paper = 0.0
    for path, node in jax.tree_util.tree_leaves_with_path(parameters, is_leaf=is_form):
        if is_form(node):
            stored, paper = stored + node.stored_bits(), paper + node.paper_bits()
        else:
            stored += FLOAT_BITS * node.size
            paper += 0 if path[-1].key == "gain" else FLOAT_BITS * node.size
    return stored, paper
