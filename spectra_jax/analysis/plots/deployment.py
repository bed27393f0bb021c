"""Memory, speed-up and hardware: the paper's figures 2 and 21, for any models and devices."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from spectra_jax.analysis import accelerators
from spectra_jax.analysis.plots.style import family_of, log_ticks, looks, panels, save

VENDORS = {"NVIDIA": ("#000000", "o"), "AMD": ("#56B4E9", "^"), "Intel": ("#999999", "s"), "Google": ("#882255", "D")}
LINES = (("H100 SXM", 1), ("MI300X", 1), ("H100 SXM", 4), ("H100 SXM", 8))  # of figure 2


def memory(
    table: pd.DataFrame, path: Path | str | None = None, *, devices: Sequence[tuple[str, int]] = LINES
) -> Figure:
    """GB of models against parameters, with what so many of a device hold (rows of `deployment.table`)."""
    with panels(height=2.9) as (figure, axes):
        families = {name: family_of(name) for name in table["family"].unique()}
        for family, look in zip(families, looks(families)):
            of = table[table["family"] == family].sort_values("parameters")
            axes.plot(of["parameters"], of["total"], label=family, **look)
        for name, count in devices:
            held = accelerators.find(name)["memory_gb"] * count
            axes.axhline(held, color="#777777", linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
            axes.annotate(f"{count} x {name}" if count > 1 else name, (0.01, held), fontsize=6.5, color="#555555",
                          xycoords=("axes fraction", "data"), va="bottom")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, column in ((axes.xaxis, "parameters"), (axes.yaxis, "total")):
            log_ticks(axis, table[column].max() / table[column].min())
        axes.set(xlabel="parameters", ylabel="GB of weights" + (" and cache" if table["cache"].any() else ""),
                 title="Memory of models")
        axes.legend(loc="lower right")
        return save(figure, path)


def speedup(table: pd.DataFrame, path: Path | str | None = None) -> Figure:
    """How much faster memory lets models decode than at 16 bits, against parameters (rows of `deployment.table`)."""
    with panels() as (figure, axes):
        table = table[table["bits"] < 16]
        families = {name: family_of(name) for name in table["family"].unique()}
        for family, look in zip(families, looks(families)):
            of = table[table["family"] == family].sort_values("parameters")
            axes.plot(of["parameters"], of["speedup"], label=family, **look)
            limit = 16 / of["bits"].iloc[0]
            axes.axhline(limit, color=look["color"], linewidth=0.8, linestyle=(0, (3, 2)))
        axes.set_xscale("log")
        log_ticks(axes.xaxis, table["parameters"].max() / table["parameters"].min())
        axes.set(xlabel="parameters", ylabel="times 16 bits", ylim=(0, None),
                 title="Decoding by bandwidth (dashed: blocks alone)")
        axes.legend(loc="best")
        return save(figure, path)


def hardware(path: Path | str | None = None) -> Figure:
    """Memory and bandwidth for each TFLOP/s of every accelerator over the years, a line through each vendor's."""
    known, lines = accelerators.ratios(), accelerators.trends()
    with panels(2, 1, height=4.2, sharex=True) as (figure, grid):
        for axes, ratio in zip(grid[:, 0], accelerators.RATIOS):
            for vendor, devices in known.groupby("vendor", sort=False):
                color, marker = VENDORS[vendor]
                line = lines[(lines["ratio"] == ratio) & (lines["vendor"] == vendor)].iloc[0]
                axes.plot(devices["year"], devices[ratio], color=color, marker=marker, linestyle="", label=vendor)
                years = np.array([devices["year"].min(), devices["year"].max()])
                axes.plot(years, line["in_2024"] + line["slope"] * (years - 2024), color=color, linewidth=0.9)
            axes.set(ylabel=ratio, ylim=(0, None))
        grid[0, 0].set_title("Accelerators: memory against 16-bit arithmetic")
        grid[0, 0].legend(loc="upper right")
        grid[1, 0].set(xlabel="year of release")
        grid[1, 0].xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        return save(figure, path)
