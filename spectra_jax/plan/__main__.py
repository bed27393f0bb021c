"""`python -m spectra_jax.plan`: see cli.py."""

from spectra_jax.cli import main

if __name__ == "__main__":
    main("plan")
