"""From a float model to a quantized one, without training; called, it does so (`spectra_jax.api.quantize`)."""

from spectra_jax.callable import make_callable

make_callable(__name__)
