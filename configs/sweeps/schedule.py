"""The optimisation-schedule ablation: TriLM with both interventions, either, or none.

Command:  spectra sweep --sweep=configs/sweeps/schedule.py:1.1b --workdir=runs/schedule --config.data.sets=PREPARED
Tiny:     spectra sweep --sweep=configs/sweeps/schedule.py:tiny --workdir=runs/schedule --config.data.sets=PREPARED
          (the prepared set of the quickstart fits: context 256, vocabulary 4096)
Chips:    each row at 1.1b is a third of TriLM 1.1b's run (100B tokens); tiny: minutes on 2 CPU cores
Loss:     the paper prints none; its order of final training loss, best first: both, only decay, only peak, neither
Answers:  the ablation of section 4.3 and Tables 10 and 11 of the Spectra paper (arXiv 2407.12327)
"""

from pathlib import Path

from spectra_jax import config, quickstart

CONFIGS = Path(__file__).parents[1]


def get_sweep(size: str = "1.1b"):
    """Four arms; the same everything but the two switches."""
    rows = []
    for name, lower_peak, remove_decay in (
        ("both", True, True),
        ("only-decay-removed", False, True),
        ("only-peak-lowered", True, False),
        ("neither", False, False),
    ):
        c = quickstart.get_config("TriLM") if size == "tiny" else _paper(size)
        c.schedule.lower_peak = lower_peak
        c.schedule.remove_decay = remove_decay
        rows.append((name, c))
    return rows


def _paper(size: str):
    c = config.run_config_file(f"{CONFIGS / 'trilm.py'}:{size}", "get_config")
    c.train.tokens = 100_000_000_000
    return c
