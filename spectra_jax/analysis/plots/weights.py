"""Entropies of weights against size (Spectra, appendix E)."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from spectra_jax.analysis.plots.style import RUNS, log_ticks, panels, save


def entropies(table: pd.DataFrame, path: Path | str | None = None) -> Figure:
    """Differential entropy, and Shannon entropies by number of bins, of the models in `analysis.weights.entropies`."""
    table = table.sort_values("linear")
    with panels(2, 1, height=4.2, sharex=True) as (figure, grid):
        top, below = grid[:, 0]
        top.plot(table["linear"], table["differential_entropy"], color="#222222", marker="o", linestyle="-")
        top.set(ylabel="differential entropy (bits)", title="Entropy of weights")
        binned = [name for name in table if name.startswith("entropy_")]
        for name, (color, marker) in zip(binned, RUNS):
            below.plot(table["linear"], table[name], color=color, marker=marker, label=f"{name[8:]} bins")
        below.set(xlabel="parameters of the block matrices", ylabel="Shannon entropy (bits)")
        below.set_xscale("log")
        log_ticks(below.xaxis, table["linear"].max() / table["linear"].min())
        below.legend(loc="best")
        return save(figure, path)
