"""Needs and speed of a run on machines that are not here; called, it tells them (`spectra_jax.api.plan`)."""

from spectra_jax.callable import make_callable

make_callable(__name__)
