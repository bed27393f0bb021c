"""Entropies of weights against size (Spectra, appendix E)."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from spectra_jax.analysis.plots.style import RUNS, family_of, legend, log_ticks, looks, panels, save


def entropies(table: pd.DataFrame, path: Path | str | None = None) -> Figure:
    """Differential entropy of every family, and Shannon entropies by number of bins of one (FloatLM, if it is there).

    table: `analysis.weights.entropies`; models of one label and size (seeds) are drawn as their mean.
    """
    table = table.groupby(["label", "linear"], as_index=False, sort=True).mean(numeric_only=True)
    labels = {name: family_of(name) for name in table["label"].unique()}
    shown = next((name for name in ("FloatLM", *labels) if name in labels))
    with panels(2, 1, height=4.8, sharex=True) as (figure, grid):
        top, below = grid[:, 0]
        for name, look in zip(labels, looks(labels)):
            of = table[table["label"] == name]
            top.plot(of["linear"], of["differential_entropy"], label=name, **look)
        top.set(ylabel="differential\nentropy (bits)", title="Entropy of weights")
        of = table[table["label"] == shown]
        for name, (color, marker) in zip((name for name in table if name.startswith("entropy_")), RUNS):
            below.plot(of["linear"], of[name], color=color, marker=marker, label=f"{name[8:]} bins")
        below.set(xlabel="parameters of the block matrices", ylabel=f"Shannon entropy (bits),\n{shown}")
        below.set_xscale("log")
        log_ticks(below.xaxis, table["linear"].max() / table["linear"].min())
        legend(figure, top)
        below.legend(loc="best", fontsize=6)
        return save(figure, path)
