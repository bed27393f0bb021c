"""TriLM, any size of the suite: ternary block matrices trained from scratch.

Command:  spectra train --config=configs/trilm.py:3.9b --workdir=runs/trilm-3.9b --config.data.sets=PREPARED
Sizes:    99m 190m 390m 560m 830m 1.1b 1.5b 2.4b 3.9b (`spectra suite` prints them)
Chips:    by arithmetic, not measured: 3.9b on 64 TPU v5p at least 4.4 days, 99m on 16 TPU v5e at least 25 hours
Loss:     the paper's law for 300B tokens, 185 N^-0.26 + 1.76: 99m 3.30, 390m 2.84, 1.1b 2.58, 3.9b 2.35
Answers:  the TriLM rows of the Spectra paper's Tables 3-13 (arXiv 2407.12327)
"""

from spectra_jax import config, suite


def get_config(size: str = "99m"):
    """The suite's TriLM of one size."""
    c = config.for_size("TriLM", "trilm", size)
    row = suite.SIZES[size]
    c.model.weight = "ternary"
    c.model.scale_shards = row.scale_shards
    c.data.batch = suite.TRI_BATCH
    # Linear decay with two interventions (section 3.3).
    c.schedule.shape = "linear"
    c.schedule.peak, c.schedule.lowered_peak = row.tri_lr
    c.schedule.lower_peak = True
    c.schedule.lower_at = 1 / 2
    c.schedule.remove_decay = True
    # Section 3.3 says two thirds; the runs of appendix F did it near 0.58 (1.5B) and at 0.75 (190M).
    c.schedule.remove_at = 2 / 3
    return c
