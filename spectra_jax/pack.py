"""`python -m spectra_jax.pack`: see cli.py."""

from spectra_jax.cli import main

if __name__ == "__main__":
    main("pack")
