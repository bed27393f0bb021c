"""A compressed delta between a fine-tuned model and its base, or between two checkpoints of one run.

Command:  spectra delta runs/base runs/finetuned --config=configs/delta.py --out=runs/finetuned-delta
Presets:  delta-come, and its baselines at as many bits, low-rank and bit-delta: configs/delta.py:low-rank
Chips:    one is enough, as for configs/quantlm.py; the singular vectors are the host's work
Loss:     at 529k from 3.145 to a tuned 3.129: delta-come 3.140, bit-delta 3.134 (results/rivals); the paper's averages
          over its benchmarks: fine-tuned 53.5, Delta-CoMe 53.2, BitDelta 49.3, low rank 47.8
Answers:  the 1/16 rows of Delta-CoMe's table (arXiv 2406.08903): about 1 bit per weight of a delta beside its base
"""

from spectra_jax import config
from spectra_jax.errors import one_of

# GPTQ with groups of 128, act-order and damping 0.01, true-sequential, with zero points, as the paper's code has it.
SOLVER = {"grid": "gptq_asymmetric", "group": 128, "act_order": True, "true_sequential": True}
PRESETS = {
    "delta-come": {"method": "delta_come", "bands": ("8:2", "3:32", "2:rest"), "delta_bits": 1.0, **SOLVER},
    "low-rank": {"method": "delta_come", "bands": ("16:rest",), "delta_bits": 1.0, **SOLVER},
    "bit-delta": {"method": "bit_delta"},
}


def get_config(preset: str = "delta-come"):
    """Settings for `spectra delta`; any of them is changed by --config.quantize.KEY=VALUE."""
    c = config.default()
    c.family, c.name = "Delta", preset
    c.quantize.update(PRESETS[one_of(preset, PRESETS, "configs/delta.py")])
    return c


def presets() -> list[str]:
    """Their names."""
    return list(PRESETS)
