"""Loss against size with fitted laws, and the gap between two families."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from spectra_jax.analysis.plots.style import family_of as family_in
from spectra_jax.analysis.plots.style import legend, log_ticks, looks, panels, save
from spectra_jax.analysis.scaling_laws import Fit, Law
from spectra_jax.errors import UserError

X_LABELS = {
    "parameters": "parameters", "linear": "parameters of the block matrices", "stored_bits": "stored bits",
    "block_bits": "stored bits of the block matrices", "paper_bits": "bits, as the paper counts",
}
EQUATIONS = {"offset": "{A:.3g} x^-{alpha:.3f} + {E:.2f}", "power": "{A:.3g} x^-{alpha:.3f}", "joint": ""}


def scaling(fit: Fit, path: Path | str | None = None, *, extend: float | int = 1.0) -> Figure:
    """The points of a fit, its curves with their 95 % bands, and of up to three groups the equations.

    Args:
      extend: how many times as far as its largest point a group's curve goes.

    Raises:
      UserError: a joint law, which has no single curve.
    """
    if fit.law.form == "joint":
        raise UserError("a joint law of size and tokens is no curve; tabulate it")
    groups = {name: family_in(name) for name in fit.law.constants}
    column = next(name for name in fit.points if set(fit.points[name]) == set(groups))
    y = next(name for name in ("loss", *fit.points) if name in fit.points)
    with panels(height=2.7 + (0.1 * len(groups) if len(groups) > 3 else 0)) as (figure, axes):
        sizes, lowest = fit.points[fit.x], np.inf
        for (name, c), look in zip(fit.law.constants.items(), looks(groups), strict=True):
            of = fit.points[fit.points[column] == name]
            xs = np.geomspace(of[fit.x].min() / 1.1, of[fit.x].max() * 1.1 * extend, 100)
            lowest = min(lowest, fit.law(name, xs[-1]))
            if fit.samples:
                axes.fill_between(xs, *fit.band(name, xs), color=look["color"], alpha=0.15, linewidth=0)
            text = f"{name}: {EQUATIONS[fit.law.form].format(**c)}" if len(groups) <= 3 else name
            # No markers on the curve itself, but the legend shows one: it signs the curve too.
            axes.plot(xs, fit.law(name, xs), markevery=[], linewidth=1.0, label=text, **look)
            axes.plot(of[fit.x], of[y], **look | {"linestyle": ""})
        axes.set_xscale("log")
        log_ticks(axes.xaxis, sizes.max() / sizes.min() * extend)
        low, high = fit.points[y].min(), fit.points[y].max()
        axes.set_ylim(min(low, lowest) - 0.1 * (high - low), None)
        axes.set(xlabel=X_LABELS.get(fit.x, fit.x), ylabel="loss (nats per token)", title="Loss against size")
        legend(figure, axes, loc="upper right")
        return save(figure, path)


def published_laws(
    laws: Mapping[str, Law], path: Path | str | None = None, *, sizes: tuple[float | int, float | int] = (99e6, 400e9)
) -> Figure:
    """Published laws over a range of sizes, and below the loss of TriLM above FloatLM's in per cent."""
    with panels(2, 1, height=4.2, sharex=True, height_ratios=(1.4, 1)) as (figure, grid):
        top, below = grid[:, 0]
        xs = np.geomspace(*sizes, 200)
        for (title, law), dash in zip(laws.items(), ("-", (0, (4, 1.5)), (0, (1.5, 1.2)))):
            for name, look in zip(law.constants, looks({name: family_in(name) for name in law.constants})):
                top.plot(xs, law(name, xs), color=look["color"], linestyle=dash, label=f"{name}, {title}")
            below.plot(xs, 100 * (law("TriLM", xs) / law("FloatLM", xs) - 1), color="#444444", linestyle=dash,
                       label=title)
        top.set(ylabel="loss (nats per token)", title="Published scaling laws")
        below.set(xlabel="parameters", ylabel="TriLM above\nFloatLM (%)")
        below.set_xscale("log")
        log_ticks(below.xaxis, sizes[1] / sizes[0])
        top.legend(loc="upper right")
        below.legend(loc="upper right")
        return save(figure, path)


def gaps(table: pd.DataFrame, path: Path | str | None = None, *, x: str = "parameters") -> Figure:
    """How far families lie above each other, against size.

    table: columns pair ("TriLM - FloatLM"), `x`, gap (nats per token), error (of one standard deviation; NaN: none).
    """
    with panels() as (figure, axes):
        pairs = {pair: family_in(pair) for pair in table["pair"].unique()}
        for pair, look in zip(pairs, looks(pairs)):
            of = table[table["pair"] == pair].sort_values(x)
            axes.errorbar(of[x], of["gap"], yerr=2 * of["error"].fillna(0.0), label=pair, capsize=2, linewidth=0.9,
                          **look)
        axes.axhline(0.0, color="#777777", linewidth=0.8)
        axes.set_xscale("log")
        log_ticks(axes.xaxis, table[x].max() / table[x].min())
        axes.set(xlabel=X_LABELS.get(x, x), ylabel="nats per token", title="Gaps (bars: 2 standard errors)")
        legend(figure, axes)
        return save(figure, path)
