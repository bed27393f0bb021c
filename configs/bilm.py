"""BiLM, any size of the suite: binary block matrices trained from scratch.

Command:  spectra train --config=configs/bilm.py:1.1b --workdir=runs/bilm-1.1b --config.data.sets=PREPARED
Sizes:    the paper trained 99m, 560m and 1.1b; every size of the suite builds
Chips:    as TriLM of the same size
Loss:     the paper's BiLM stands above TriLM by 0.189 (99m), 0.155 (560m), 0.118 (1.1b) in validation
Answers:  the BiLM rows of the Spectra paper's tables and its figure 15 (arXiv 2407.12327)
"""

from spectra_jax import config, suite


def get_config(size: str = "99m"):
    """The suite's BiLM of one size: TriLM's recipe with another weight rule."""
    c = config.for_size("BiLM", "bilm", size)
    row = suite.SIZES[size]
    c.model.weight = "binary"
    c.model.scale_shards = row.scale_shards
    c.data.batch = suite.TRI_BATCH
    c.schedule.shape = "linear"
    # No learning rates of BiLM are published; TriLM's are taken.
    c.schedule.peak, c.schedule.lowered_peak = row.tri_lr
    c.schedule.lower_peak = True
    c.schedule.lower_at = 1 / 2
    c.schedule.remove_decay = True
    c.schedule.remove_at = 2 / 3
    return c
