"""Quality of a model on held-out data; called, it evaluates (`spectra_jax.api.evaluate`)."""

from spectra_jax.callable import make_callable

make_callable(__name__)
