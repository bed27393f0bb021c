"""What training does to weights and to the loss around them."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectra_jax.analysis.plots.style import count_label, panels, save

# The two paths of a quantized model, told apart from families: neither is one.
PATHS = {"latent": ("#222222", "-"), "effective": ("#56B4E9", (0, (4, 1.5)))}


def dynamics(
    updates: pd.DataFrame, landscape: pd.DataFrame, marks: Mapping[int, str], path: Path | str | None = None, *,
    x: str = "step",
) -> Figure:
    """Eight panels over training, the schedule's interventions marked.

    Args:
      updates, landscape: of `analysis.dynamics`; of the updates the largest and the mean over all matrices are drawn.
      marks: step -> what happened.
    """
    with panels(4, 2, width=7.0, height=7.2, sharex=True) as (figure, grid):
        by_step = updates.groupby(x, as_index=False)
        largest, mean = by_step.max(numeric_only=True), by_step.mean(numeric_only=True)
        _paths(grid[0, 0], largest, x, "{}_max", "largest update", log=True)
        _paths(grid[0, 1], mean, x, "{}_mean", "mean update", log=True)
        if "flips" in mean:
            grid[1, 0].plot(mean[x], 100 * mean["flips"], color="#222222", marker=".")
        grid[1, 0].set(ylabel="codes that changed (%)")
        grid[1, 1].plot(landscape[x], landscape["gradient_norm"], color="#222222", marker=".")
        grid[1, 1].set(ylabel="gradient norm")
        grid[2, 0].plot(landscape[x], landscape["cosine"], color="#222222", marker=".")
        grid[2, 0].set(ylabel="cosine of gradients\nto the next checkpoint")
        for axes, name, label in (
            (grid[2, 1], "first", "first derivative"), (grid[3, 0], "second", "second derivative"),
            (grid[3, 1], "curvature", "curvature of the loss"),
        ):
            _paths(axes, landscape, x, "{}_" + name, label)
        for axes in grid.flat:
            for step, text in marks.items():
                axes.axvline(step, color="#777777", linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
                if axes in (grid[0, 0], grid[0, 1]):
                    axes.annotate(text.replace(" ", "\n", 1), (step, 1.01), xycoords=("data", "axes fraction"),
                                  ha="center", va="bottom", fontsize=6.5, color="#555555")
            axes.xaxis.set_major_formatter(lambda value, _: count_label(value))
        for axes in grid[3]:
            axes.set(xlabel={"step": "optimizer step", "tokens": "training tokens"}.get(x, x))
        grid[0, 0].legend(loc="best")
        return save(figure, path)


def _paths(axes: Axes, table: pd.DataFrame, x: str, column: str, label: str, log: bool = False) -> None:
    """One quantity along both paths; of a float model they are one."""
    latent, effective = (table[column.format(name)] for name in PATHS)
    for name, (color, dash) in PATHS.items():
        if name == "latent" or not latent.equals(effective):
            axes.plot(table[x], table[column.format(name)], color=color, linestyle=dash, marker=".", label=name)
    axes.set(ylabel=label)
    if log:
        axes.set_yscale("log")
