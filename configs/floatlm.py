"""FloatLM, any size of the suite: the float baseline, and what QuantLMs are made from.

Command:  spectra train --config=configs/floatlm.py:99m --workdir=runs/floatlm-99m --config.data.sets=PREPARED
Sizes:    99m 190m 390m 560m 830m 1.1b 1.5b 2.4b 3.9b (`spectra suite` prints them)
Chips:    by arithmetic, not measured: 3.9b on 64 TPU v5p at least 4.4 days, 99m on 16 TPU v5e at least 25 hours
Loss:     the paper's law for 300B tokens, 159 N^-0.26 + 1.67: 99m 2.99, 390m 2.60, 1.1b 2.37, 3.9b 2.18
Answers:  the FloatLM rows of the Spectra paper's Tables 3-13 (arXiv 2407.12327)
"""

from spectra_jax import config, suite


def get_config(size: str = "99m"):
    """The suite's FloatLM of one size."""
    c = config.for_size("FloatLM", "floatlm", size)
    c.data.batch = suite.FLOAT_BATCH
    c.schedule.shape = "cosine"
    c.schedule.peak = suite.SIZES[size].float_lr
    c.schedule.final = 0.1  # not stated in the paper; the usual value of its code base
    return c
