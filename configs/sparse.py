"""Sparse pretraining: a pruned run goes on training, and what is zero stays zero.

Command:  spectra train --config=configs/sparse.py:runs/pruned --workdir=runs/sparse --config.train.tokens=1e9
Argument: a run pruned by `spectra quantize --config=configs/quantlm.py:sparsegpt-50` (or sparsegpt-2of4, magnitude-50)
Ternary:  --config.model.weight=ternary trains a sparse TriLM with the same map
Chips:    as dense training of the same shape: zeros are multiplied all the same
Loss:     at 529k, 50 %, 3.31 pruned and 3.16 trained on, float 3.15; a sparse TriLM 3.25 (results/rivals)
Answers:  Sparse Llama (arXiv 2405.03594): 50 % by SparseGPT, then 45 to 50B tokens; then 70 %, and 100B more
"""

from spectra_jax.train.start import config_from


def get_config(run: str = ""):
    """On the shape and data of `run`, with a constant mask; without one, on the schema's shape."""
    c = config_from(run)
    c.family, c.name = "SparseLM", "sparse"
    c.model.weight, c.optimizer.keep_zeros = "sparse", True
    c.train.tokens = 50_000_000_000
    c.schedule.peak = 1e-4  # not known
    return c
