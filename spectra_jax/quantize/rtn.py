"""Round to nearest: every weight to the level next to it, whatever the inputs are."""

from jaxtyping import Array, Float

from spectra_jax.quantize import grids
from spectra_jax.quantize.gptq import as_grid
from spectra_jax.schema import Quantize
from spectra_jax.weights.grid import Grid


def rtn(w: Float[Array, "m n"], h: Array | None, q: Quantize, name: str = "matrix") -> Grid:
    """The quantized matrix (in, out); `h` is not looked at.

    Raises:
      UserError: groups that do not divide.
    """
    return nearest(w, q, grids.group_of(w.shape[0], q, name))


def nearest(
    w: Float[Array, "m n"], q: Quantize, group: int, tokens8: bool = False, threshold: float = 0.0
) -> Grid:
    """The same, with what `Grid` is to do to its input."""
    groups = w.reshape(-1, group, w.shape[1])
    levels = grids.fit(groups, q.grid, q.bits, mse=q.mse, scale_dtype=q.scale_dtype)
    return as_grid(w, levels, None, q, tokens8=tokens8, threshold=threshold)
