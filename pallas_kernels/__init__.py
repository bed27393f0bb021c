"""Products with packed ternary matrices on TPU, GPU and CPU. It imports jax only; start at `api.py`."""
