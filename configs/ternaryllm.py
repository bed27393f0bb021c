"""TernaryLLM: ternary matrices whose scales and shifts are learned, from scratch or taught by a FloatLM.

Command:  spectra train --config=configs/ternaryllm.py:99m --workdir=runs/ternaryllm-99m --config.data.sets=PREPARED
Taught:   the same with --config.train.start=RUN --config.distill.teacher=RUN, a FloatLM of that shape
Sizes:    99m 190m 390m 560m 830m 1.1b 1.5b 2.4b 3.9b (`spectra suite` prints them)
Chips:    as configs/trilm.py, and a forward pass of the teacher more; not measured
Loss:     of these sizes not measured; at 529k 3.24, taught or not, where TriLM has 3.28 (results/rivals)
Answers:  arXiv 2406.07177, whose numbers, rates and weights of the losses are not known to us: TriLM's schedule is used
"""

from spectra_jax import config, suite


def get_config(size: str = "99m"):
    """Dual Learnable Ternarization in the shape of one size of the suite."""
    c = config.for_size("TernaryLLM", "ternaryllm", size)
    row = suite.SIZES[size]
    c.model.weight = "dlt"
    c.data.batch = suite.TRI_BATCH
    c.schedule.update(shape="linear", lower_peak=True, remove_decay=True)
    c.schedule.peak, c.schedule.lowered_peak = row.tri_lr
    # Scales and shifts have rates of their own; how high is not known.
    c.optimizer.rates = ("w.scale=0.1", "w.shift=0.1")
    c.optimizer.no_decay = ("norm", "w.scale", "w.shift")
    return c
