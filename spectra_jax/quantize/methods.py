"""The methods by name. A new one is a new file with a function of (matrix, Hessian, settings, name) and a line here."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxtyping import Array, PyTree

from spectra_jax.errors import one_of
from spectra_jax.quantize import awq
from spectra_jax.quantize.billm import billm
from spectra_jax.quantize.blockwise import TYPES, blockwise
from spectra_jax.quantize.gptq import gptq
from spectra_jax.quantize.grids import GRIDS
from spectra_jax.quantize.magnitude import magnitude
from spectra_jax.quantize.pbllm import pbllm
from spectra_jax.quantize.rtn import rtn
from spectra_jax.quantize.smooth import OUTLIER, smooth, w8a8
from spectra_jax.quantize.sparsegpt import sparsegpt, sparsegpt_quantized
from spectra_jax.schema import Quantize
from spectra_jax.weights.form import Form


class Method(NamedTuple):
    """One way to quantize.

    matrix: (w (in, out), Hessian of its inputs or None, settings, name) -> its stored form.
    hessian: whether `matrix` needs the Hessian.
    prepare: (parameters of a float block, inputs of the block by batch, blocks.Blocks, settings) -> float parameters
      that quantize better (ranges moved to where they do no harm, weights clipped); runs before `matrix`.
    grids: the names that `config.quantize.grid` may have; empty: it is not looked at.
    """

    matrix: Callable[[Array, Array | None, Quantize, str], Form]
    hessian: bool = False
    prepare: Callable[..., PyTree] | None = None
    grids: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "rtn": Method(rtn, grids=GRIDS),
    "gptq": Method(gptq, hessian=True, grids=GRIDS),
    "awq": Method(rtn, prepare=awq.scale_and_clip, grids=GRIDS),
    "blockwise": Method(blockwise, grids=TYPES),
    "blockwise_double": Method(partial(blockwise, double=True), grids=TYPES),
    "smoothquant": Method(w8a8, prepare=smooth, grids=GRIDS),
    "llm_int8": Method(partial(w8a8, threshold=OUTLIER), grids=GRIDS),
    "sparsegpt": Method(sparsegpt, hessian=True),
    "sparsegpt_quantized": Method(sparsegpt_quantized, hessian=True),
    "magnitude": Method(magnitude),
    "billm": Method(billm, hessian=True),
    "pbllm": Method(pbllm, hessian=True),
}


def get_method(name: str, grid: str | None = None) -> Method:
    """The method of this name, which is to use this grid.

    Raises:
      UserError: there is none, or it has no such grid; the message names the nearest.
    """
    method = METHODS[one_of(name, METHODS, "config.quantize.method")]
    if grid is not None and method.grids:
        one_of(grid, method.grids, f"config.quantize.method={name}, config.quantize.grid")
    return method
