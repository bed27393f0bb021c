"""The precision ablation: TriLM in float16 as the paper trained, in bfloat16, and with gradients added up in float32.

Command:  spectra sweep --sweep=configs/sweeps/precision.py:1.1b --workdir=runs/precision --config.data.sets=PREPARED
Tiny:     the same with :tiny, on the prepared set of the quickstart; CPUs are slow at 16 bits
Chips:    each row at 1.1b is a third of TriLM 1.1b's run (100B tokens); TPUs compute float16 in wider types
Loss:     not published; no arm is expected to stand apart by more than another seed would
Answers:  Table 5 of the Spectra paper (arXiv 2407.12327): the lowest `loss_scale` and the `skipped` steps of a run in
          metrics.jsonl; its TriLM 1.1B of 300B tokens had 512 and 306
"""

from pathlib import Path

from spectra_jax import config, quickstart

CONFIGS = Path(__file__).parents[1]


def get_sweep(size: str = "1.1b"):
    """Three arms that differ in dtypes only."""
    rows = []
    for name, compute, gradient in (
        ("float16", "float16", "compute"),
        ("bfloat16", "bfloat16", "compute"),
        ("bfloat16-gradients-float32", "bfloat16", "float32"),
    ):
        if size == "tiny":
            c = quickstart.get_config("TriLM")
        else:
            c = config.run_config_file(f"{CONFIGS / 'trilm.py'}:{size}", "get_config")
            c.train.tokens = 100_000_000_000
        c.model.compute_dtype, c.model.gradient_dtype = compute, gradient
        rows.append((name, c))
    return rows
