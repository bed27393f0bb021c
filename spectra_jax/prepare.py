"""`python -m spectra_jax.prepare`: see cli.py. Called, `spectra_jax.prepare(...)`: see api.py."""

from spectra_jax.callable import make_callable
from spectra_jax.cli import main

if __name__ == "__main__":
    main("prepare")
else:
    make_callable(__name__)
