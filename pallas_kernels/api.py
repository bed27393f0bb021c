"""`ternary_matmul`: one product, several implementations, each a module with the same five names.

    LAYOUT             name of the memory layout that its `convert` makes
    convert(weights)   canonical weights in that layout
    codes(weights)     the codes again, (*L, m, n) int8
    refuses(x, w)      why it cannot compute this product here, or None; `x` is the ShapeDtypeStruct (M, m)
    matmul(x, w)       x (M, m) times the matrix, (M, n) in the dtype of x; scales included
"""

from dataclasses import replace
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from pallas_kernels import cpu, gpu, tpu, xla
from pallas_kernels.packing import CODES_PER_BYTE, Packed, expand, pack, unpack

__all__ = ["Packed", "check", "choose", "pack", "prepare", "ternary_matmul", "unpack"]

IMPLEMENTATIONS: dict[str, ModuleType] = {"tpu": tpu, "gpu": gpu, "cpu": cpu, "xla": xla}


def ternary_matmul(
    x: Shaped[Array, "*B m"], weights: Packed, *, implementation: str | None = None
) -> Float[Array, "*B n"]:
    """x @ (scale * code), differentiable with respect to x.

    Args:
      weights: in canonical storage or in the layout of an implementation (`prepare`).
      implementation: by default the one whose layout it is; "xla" for canonical storage.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an implementation that cannot serve; the message says why.
    """
    if x.shape[-1] != weights.m:
        raise ValueError(f"x has {x.shape[-1]} inputs and the matrix {weights.m}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; activations are float32, bfloat16 or float16")
    rows = x.reshape(-1, x.shape[-1])
    name = implementation or owner(weights.layout)
    module = _module(name)
    if weights.layout in CODES_PER_BYTE and name != "xla":
        weights = module.convert(weights)
    check(jax.ShapeDtypeStruct(rows.shape, rows.dtype), weights, name)
    return _product(name, rows, weights).reshape(*x.shape[:-1], weights.n)


def check(x: jax.ShapeDtypeStruct, weights: Packed, implementation: str) -> None:
    """Raises ValueError if the implementation cannot serve; the message says why."""
    if reason := _module(implementation).refuses(x, weights):
        raise ValueError(f"{implementation!r} cannot serve {x.shape} x {(weights.m, weights.n)}: {reason}")


def choose(x: jax.ShapeDtypeStruct, weights: Packed) -> tuple[str, dict[str, str]]:
    """The first implementation that serves on the default device, and why those before it do not."""
    reasons = {}
    for name, module in IMPLEMENTATIONS.items():
        reason = module.refuses(x, weights)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    raise ValueError(f"nothing serves {x.shape} x {(weights.m, weights.n)}: {reasons}")


def prepare(weights: Packed, implementation: str) -> Packed:
    """Canonical weights in the layout of an implementation: once, when a model is loaded."""
    return _module(implementation).convert(weights)


def owner(layout: str) -> str:
    """The implementation whose layout this is."""
    if layout in CODES_PER_BYTE:
        return "xla"
    return next(name for name, module in IMPLEMENTATIONS.items() if module.LAYOUT == layout)


def _module(name: str) -> ModuleType:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"there is no implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(name: str, x: Float[Array, "M m"], weights: Packed) -> Float[Array, "M n"]:
    return _module(name).matmul(x, weights)


def _forward(name, x, weights):
    return _product(name, x, weights), weights


def _backward(name, weights, g):
    codes = _module(owner(weights.layout)).codes(weights)
    matrix = codes.astype(jnp.float32) * expand(weights.scales, weights.m, weights.n)
    dx = jnp.dot(g.astype(jnp.float32), matrix.T, precision=jax.lax.Precision.HIGHEST)
    no_gradient = np.zeros(weights.data.shape, jax.dtypes.float0)  # of whole numbers
    return dx.astype(g.dtype), replace(weights, data=no_gradient, scales=jnp.zeros_like(weights.scales))


_product.defvjp(_forward, _backward)
