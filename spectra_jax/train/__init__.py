"""Loss, optimizer, schedule, step and loop; called, it trains (`spectra_jax.api.train`)."""

from spectra_jax.callable import make_callable

make_callable(__name__)
