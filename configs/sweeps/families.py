"""TriLM, BitNet b1.58 and FloatLM on the same data: the paper's comparison, at any size.

Command:  spectra sweep --sweep=configs/sweeps/families.py:1.1b --workdir=runs/families --config.data.sets=PREPARED
Tiny:     the same with :tiny, on the prepared set of the quickstart
Chips:    each row at 1.1b is 100B tokens; tiny: minutes on 2 CPU cores
Loss:     not printed in the paper; six-task averages at 1.1b are FloatLM 52.2, TriLM 50.2, BitNet 48.9
Answers:  Tables 10 and 11 of the Spectra paper (arXiv 2407.12327)
"""

from pathlib import Path

from spectra_jax import config, quickstart

CONFIGS = Path(__file__).parents[1]


def get_sweep(size: str = "1.1b"):
    """One row per family, 100B tokens each; BiLM beside the paper's three."""
    rows = []
    for family, file in (("FloatLM", "floatlm"), ("TriLM", "trilm"), ("BitNet", "bitnet"), ("BiLM", "bilm")):
        if size == "tiny":
            c = quickstart.get_config(family)
        else:
            c = config.run_config_file(f"{CONFIGS / file}.py:{size}", "get_config")
            c.train.tokens = 100_000_000_000
        rows.append((f"{file}-{size}", c))
    return rows
