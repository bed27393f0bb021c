"""Tasks against perplexity: whether the order by one is the order by the other."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from spectra_jax.analysis.plots.style import WIDTH, family_of, legend, looks, panels, save
from spectra_jax.errors import UserError

PANELS = 6  # tasks that one figure has room for
NAMED = 6  # models whose names a panel has room for


def against_text(values: pd.DataFrame, correlations: pd.DataFrame, path: Path | str | None = None) -> Figure:
    """Each task's first metric against bits per byte of the first text, a point for each model, bars of one error.

    Args:
      values: `axes.table`. correlations: `ranks.correlations` of them. The first 6 tasks are drawn.

    Raises:
      UserError: no text, or no task, to draw.
    """
    if correlations.empty:
        raise UserError("no text with tasks to draw against it; measure --texts and --tasks of the same runs")
    text = correlations["text"].iloc[0]
    drawn = correlations[correlations["text"] == text].drop_duplicates(["axis", "of"])[:PANELS]
    quality = values[(values["of"] == text) & (values["metric"] == "bits_per_byte")]
    families = {family: family_of(family) for family in quality["family"]}
    look = {family: {**one, "linestyle": "none"} for family, one in zip(families, looks(families), strict=True)}
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    with panels(rows, columns, width=WIDTH * columns, height=2.2 * rows + 0.1 * len(families)) as (figure, grid):
        flat = list(grid.flat) if len(drawn) > 1 else [grid]
        for axes, task in zip(flat, drawn.itertuples()):
            of = values[(values["axis"] == task.axis) & (values["of"] == task.of) & (values["metric"] == task.metric)]
            points = quality.merge(of, on=["run", "family"], suffixes=("", "_of"))
            for family, some in points.groupby("family", sort=False):
                axes.errorbar(some["value"], some["value_of"], xerr=some["error"], yerr=some["error_of"],
                              elinewidth=0.5, label=family, **look[family])
            for point in points.itertuples() if len(points) <= NAMED else ():
                axes.annotate(point.run, (point.value, point.value_of), xytext=(3, 3), fontsize=5.5,
                              textcoords="offset points")
            found = task.note or f"rho {task.spearman:.2f}, tau {task.kendall:.2f}"
            axes.set(title=f"{task.of}: {found}", xlabel=f"bits per byte of {text}", ylabel=task.metric)
        for axes in flat[len(drawn) :]:
            axes.set_visible(False)
        legend(figure, flat[0], inside=0)
        return save(figure, path)
