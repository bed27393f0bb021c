"""Whole numbers as tightly as their kind allows: how checkpoints of stored forms get as small as their account says.

    trit                -1, 0, 1                                       five to a byte
    int2 to int8        two's complement                               so many bits each
    uint1 to uint8      unsigned; uint1 also false and true            so many bits each
    sign                -1, 1                                          1 bit, set for -1

All but `trit` are one stream of bits along the inputs of an output, lowest bits first, whole bytes after every eight
inputs; int2 is then the canonical storage of `pallas_kernels`, and so is trit.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree, Shaped, UInt8

from pallas_kernels import api
from spectra_jax.sharding import gathered, in_mesh, parts
from spectra_jax.weights.form import Form, form, is_form, static
from spectra_jax.weights.frozen import Frozen

RUN = 8  # numbers that fill whole bytes at any width


@no_type_check  # as a pytree it also carries shapes or shardings: whatever a tree.map returns
@form
class Bits(Form):
    """An array of whole numbers (m, n), packed along m."""

    data: UInt8[Array, "*L r n"]
    m: int = static()
    kind: str = static()
    dtype: str = static()

    def unpacked(self) -> Shaped[Array, "*L m n"]:
        """The array."""
        if self.kind == "trit":
            return api.unpack(self.data, self.m, "5trit")
        codes = unstreamed(self.data, width(self.kind))[..., : self.m, :]
        if self.kind == "sign":
            return (1 - 2 * codes.astype(jnp.int8)).astype(self.dtype)
        if self.kind.startswith("int"):
            spare = jnp.uint8(8 - width(self.kind))
            codes = jax.lax.bitcast_convert_type(codes << spare, jnp.int8) >> spare.astype(jnp.int8)
        return codes.astype(self.dtype)


def bits(array: Shaped[Array, "*L m n"], kind: str) -> Bits:
    """The array packed."""
    if kind == "trit":
        data = api.pack(array, "5trit")
    else:
        data = streamed((array < 0 if kind == "sign" else array).astype(jnp.uint8), width(kind))
    return Bits(data, array.shape[-2], kind, str(array.dtype))


def width(kind: str) -> int:
    """Bits of a number of this kind."""
    return 1 if kind == "sign" else int(kind.removeprefix("u").removeprefix("int"))


def streamed(codes: UInt8[Array, "*L m n"], width: int) -> UInt8[Array, "*L r n"]:
    """The lowest `width` bits of each number, as bytes; numbers past the end are 0."""
    *lead, m, n = codes.shape
    codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, -m % RUN), (0, 0)]).reshape(*lead, -1, RUN, n)
    places = [divmod(place, width) for place in range(RUN * width)]
    single = [(codes[..., k, :] >> jnp.uint8(bit)) & jnp.uint8(1) for k, bit in places]
    rows = [sum(single[8 * r + t] << jnp.uint8(t) for t in range(8)) for r in range(width)]
    return jnp.stack(rows, axis=-2).reshape(*lead, -1, n)


def unstreamed(data: UInt8[Array, "*L r n"], width: int) -> UInt8[Array, "*L m n"]:
    """The numbers again, up to a multiple of eight of them."""
    *lead, _, n = data.shape
    rows = data.reshape(*lead, -1, width, n)
    places = [divmod(place, 8) for place in range(RUN * width)]
    single = [(rows[..., r, :] >> jnp.uint8(bit)) & jnp.uint8(1) for r, bit in places]
    codes = [sum(single[k * width + j] << jnp.uint8(j) for j in range(width)) for k in range(RUN)]
    return jnp.stack(codes, axis=-2).reshape(*lead, -1, n)


def pack(parameters: PyTree, *, trits: bool = False) -> PyTree:
    """The parameters with every array of whole numbers packed, where that makes it smaller.

    Args:
      trits: ternary codes at 1.6 bits instead of 2.
    """

    def of(node: PyTree) -> PyTree:
        if not is_form(node):
            return node
        kinds = node.kinds()
        if trits and isinstance(node, Frozen) and node.code_bits == 2:
            kinds = {"codes": "trit"}
        new = {}
        for f in fields(node):
            value = getattr(node, f.name)
            if is_form(value):
                new[f.name] = of(value)
            elif f.name in kinds and value is not None:
                small = jax.jit(bits, static_argnums=1)(gathered(value), kinds[f.name])
                new[f.name] = small if small.data.nbytes < value.nbytes else value
        return replace(node, **new)

    return jax.tree.map(of, parameters, is_leaf=is_form)


def spread(shapes: PyTree, like: PyTree) -> PyTree:
    """The shapes of packed parameters with every packed array spread over devices like its matrix.

    Each device then reads and unpacks its own part. Inputs are not divided where a part would not be whole bytes.

    Args:
      like: the model's parameters before quantization, or their shapes and shardings.
    """

    def of(node: Bits, matrix: Array | jax.ShapeDtypeStruct) -> Bits:
        sharding = jax.NamedSharding(matrix.sharding.mesh, _spec(node, matrix))
        return replace(node, data=jax.ShapeDtypeStruct(node.data.shape, node.data.dtype, sharding=sharding))

    return _each_packed(of, shapes, like)


def unpack(parameters: PyTree, like: PyTree) -> PyTree:
    """The parameters with nothing packed, each array spread over devices like its matrix if it has that shape.

    Args:
      like: as above.
    """

    def of(node: Bits, matrix: Array | jax.ShapeDtypeStruct) -> Array:
        if not in_mesh():
            return jax.jit(Bits.unpacked)(node)
        return _unpacked(node, _spec(node, matrix), matrix.sharding.spec if _whole(node, matrix) else P())

    return _each_packed(of, parameters, like)


@partial(jax.jit, static_argnums=(1, 2))
def _unpacked(node: Bits, held: P, spec: P) -> Shaped[Array, "*L m n"]:
    """Every device its part, then to where the array is wanted."""
    inputs = node.m // (parts(held[-2]) if len(held) else 1)  # P() is one whole
    run = jax.shard_map(lambda data: replace(node, data=data, m=inputs).unpacked(), in_specs=held, out_specs=held)
    return gathered(run(gathered(node.data, held)), spec)


def _each_packed(f: Callable, parameters: PyTree, like: PyTree) -> PyTree:
    """With `f` of every packed array and the matrix that it belongs to."""

    def of(node: PyTree, matrix: Array | jax.ShapeDtypeStruct) -> PyTree:
        if isinstance(node, Bits):
            return f(node, matrix)
        if not is_form(node):
            return node
        values = {f.name: getattr(node, f.name) for f in fields(node)}
        return replace(node, **{name: of(value, matrix) for name, value in values.items() if is_form(value)})

    return jax.tree.map(lambda matrix, node: of(node, matrix), like, parameters)


def _whole(node: Bits, matrix: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the array has the shape of its matrix."""
    return matrix.shape[-2:] == (node.m, node.data.shape[-1])


def _spec(node: Bits, matrix: Array | jax.ShapeDtypeStruct) -> P:
    """Where the packed bytes are."""
    if not _whole(node, matrix):
        return P()
    axes = tuple(matrix.sharding.spec)
    *lead, inputs, outputs = axes + (None,) * (len(matrix.shape) - len(axes))
    run = 5 if node.kind == "trit" else RUN
    return P(*lead, None if node.m % (run * parts(inputs)) else inputs, outputs)
