"""Benchmarks of the published models, and one's own in the same axes, against parameters and bits."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from spectra_jax.analysis.plots.style import family_of, legend, log_ticks, looks, panels, save
from spectra_jax.errors import UserError

LABELS = {"parameters": "parameters", "paper_bits": "bits of the model, as the paper counts"}


def benchmark(
    table: pd.DataFrame, path: Path | str | None = None, *, task: str = "commonsense", metric: str = "avg6",
    own: pd.DataFrame | None = None,
) -> Figure:
    """One metric of every family against parameters (above) and bits (below).

    Args:
      table: `published.benchmarks()`.
      own: models to add, filled markers with names: columns model, family, parameters, paper_bits, value.

    Raises:
      UserError: no such task with that metric.
    """
    chosen = table[(table["task"] == task) & (table["metric"] == metric)]
    if chosen.empty:
        known = sorted({f"{t} {m}" for t, m in zip(table["task"], table["metric"])})
        raise UserError(f"nothing is published of {task} {metric}; there is {', '.join(known)}")
    with panels(2, 1, height=5.0) as (figure, grid):
        families = {name: family_of(name) for name in chosen["family"].unique()}
        for axes, x in zip(grid[:, 0], LABELS):
            points = chosen.dropna(subset=[x])
            for family, look in zip(families, looks(families)):
                of = points[points["family"] == family].sort_values(x)
                axes.plot(of[x], of["value"], label=family, linewidth=0.8, markersize=3.5, **look)
            for model in () if own is None else own.itertuples():
                axes.plot(getattr(model, x), model.value, color="black", marker="*", markersize=9, linestyle="")
                axes.annotate(model.model, (getattr(model, x), model.value), xytext=(4, 4), fontsize=6.5,
                              textcoords="offset points")
            axes.set_xscale("log")
            log_ticks(axes.xaxis, points[x].max() / points[x].min())
            if metric == "ppl":
                axes.set_yscale("log")
            axes.set(xlabel=LABELS[x], ylabel=f"{task} {metric}")
        grid[0, 0].set_title(f"{task} {metric}: published models" + ("" if own is None else " and one's own (stars)"))
        legend(figure, grid[0, 0])
        return save(figure, path)
