"""Optimizers with states in 32 and in 8 bits: AdamW, Lion and momentum, on a FloatLM and a TriLM of the mini-suite.

Command:  spectra sweep --sweep=configs/sweeps/optimizers.py --workdir=runs/optimizers --config.data.sets=runs/mini-data
Text:     as configs/sweeps/mini_suite.py prepares it
Chips:    one CPU core: four to five minutes a row, twelve rows
Loss:     FloatLM: AdamW 3.145, in 8 bits 3.126; Lion 3.078, 3.082; momentum 3.405, 3.406; TriLM: AdamW 3.284, 3.282
          (results/rivals; one seed, and a seed changes a loss by 0.01 to 0.02)
Answers:  Tables 1 and 2 of 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), at a thousandth of the size
"""

from copy import deepcopy
from pathlib import Path

from spectra_jax import config

MINI_SUITE = Path(__file__).with_name("mini_suite.py")
# The learning rate over AdamW's, and the other settings. Lion's are in the range of its paper (arXiv 2302.06675,
# section 5: rates 3 to 10 times lower); momentum's rate is of clipped gradients and was not searched.
OPTIMIZERS = {"adamw": (1, {}), "lion": (1 / 5, {"b2": 0.99}), "momentum": (30, {})}


def get_sweep():
    """Six rows for each family; decay is such that a step takes the same share of a weight."""
    mini = {name: c for name, c, *_ in config.run_config_file(str(MINI_SUITE), "get_sweep")}
    rows = []
    for model in ("floatlm-529k", "trilm-529k"):
        for name, (factor, settings) in OPTIMIZERS.items():
            for bits in ("", "8bit"):
                c = deepcopy(mini[model])
                c.optimizer.update(name=name + bits, weight_decay=c.optimizer.weight_decay / factor, **settings)
                c.schedule.update(peak=c.schedule.peak * factor, lowered_peak=c.schedule.lowered_peak * factor)
                rows.append((f"{model}-{name}{bits}", c))
    return rows
