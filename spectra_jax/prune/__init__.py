"""From a trained float model to a smaller one; called, it does so (`spectra_jax.api.prune`)."""

from spectra_jax.callable import make_callable

make_callable(__name__)
