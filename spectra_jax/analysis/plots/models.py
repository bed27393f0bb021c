"""Models beside each other: size against loss, weights and their codes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectra_jax.analysis.plots.style import FAMILIES, HEIGHT, OTHER, family_of, legend, log_ticks, looks, panels, save
from spectra_jax.errors import UserError


def bits_versus_loss(
    rows: Sequence[Mapping[str, Any]], path: Path | str | None = None, *, accounting: str = "stored bits"
) -> Figure:
    """Size against loss, one point per model, the models of a family joined by a line.

    rows: each with "name" (str; what it has beyond the family is written beside the point), "family"
    (str; QuantLM-3 and QuantLM-4 get a line each), "bits" (of the whole model, in the `accounting`
    that the axis names), "loss" (validation, nats per token) and optionally "loss_se" (its standard
    error, drawn as a bar).

    Raises:
      UserError: no rows.
    """
    if not rows:
        raise UserError("no models to draw")
    families = {row["family"]: family_of(row["family"]) for row in rows}
    with panels(height=HEIGHT + (0.1 * len(families) if len(families) > 6 else 0)) as (figure, axes):
        for family, look in zip(families, looks(families), strict=True):
            members = sorted((r for r in rows if r["family"] == family), key=lambda r: r["bits"])
            axes.errorbar(
                [row["bits"] for row in members], [row["loss"] for row in members],
                yerr=[row.get("loss_se") or 0.0 for row in members],
                markersize=5.5, linewidth=0.8, elinewidth=1.2, label=family, **look,
            )
        if len(rows) <= 12:  # more names than that would cover each other
            for number, row in enumerate(sorted(rows, key=lambda row: row["bits"])):
                # The legend names the family; above and below by turns, for sizes may lie close to each other.
                axes.annotate(row["name"].removeprefix(row["family"]).strip(" -"), (row["bits"], row["loss"]),
                              xytext=(4, 5 if number % 2 else -11), textcoords="offset points", fontsize=6.5,
                              color="#333333")
        bits = [row["bits"] for row in rows]
        axes.set_xscale("log")
        axes.set_xlim(min(bits) / 1.35, max(bits) * 1.6)
        log_ticks(axes.xaxis, max(bits) / min(bits))
        axes.margins(y=0.15)
        axes.set(title="Model size against validation loss", xlabel=f"model size ({accounting})",
                 ylabel="loss (nats per token)")
        legend(figure, axes, inside=6)
        return save(figure, path)


def weight_histograms(
    latent: Mapping[str, Float[np.ndarray, "..."]],
    codes: Mapping[str, Int[np.ndarray, "..."] | None],
    path: Path | str | None = None,
) -> Figure:
    """Latent weights in units of their mean magnitude, and beside them the shares of the codes.

    The mean magnitude is the scale of TriLM and BiLM (one per matrix; if one per shard, divide each
    shard by its own first). Dotted lines at +-0.5 are where a ternary weight changes its code.

    Args:
      latent: matrix name -> latent weights of any shape.
      codes: the same names -> stored codes of any shape, None for a float matrix. A name's family
        prefix ("TriLM up") chooses the colour.

    Raises:
      UserError: no matrices.
    """
    if not latent:
        raise UserError("no weights to draw")
    with panels(len(latent), 2, height=0.8 + 1.15 * len(latent), width_ratios=(2.2, 1)) as (figure, grid):
        figure.suptitle("Latent weights and their codes", fontsize=8.5)
        edges = np.linspace(-4, 4, 121)
        for (name, values), (left, right) in zip(latent.items(), grid, strict=True):
            color = FAMILIES.get(family_of(name), OTHER)[0]
            flat = np.asarray(values, np.float32).ravel()
            counts, _ = np.histogram(flat / max(np.abs(flat).mean(), 1e-30), edges)
            left.stairs(counts / (flat.size * (edges[1] - edges[0])), edges, fill=True, color=color)
            left.set(ylabel="density", xlim=(-4, 4), xticks=range(-4, 5, 2), ylim=(0, None))
            left.set_title(name, loc="left")
            _draw_codes(left, right, codes[name], color)
        grid[-1, 0].set_xlabel("latent weight / mean magnitude")
        return save(figure, path)


def _draw_codes(left: Axes, right: Axes, code: np.ndarray | None, color: str) -> None:
    """Shares of the codes as bars on `right`, with figures up to ternary; thresholds on `left`."""
    if code is None:
        right.set_axis_off()
        right.text(0.5, 0.5, "float:\nno codes", ha="center", va="center",
                   transform=right.transAxes, color="#555555")
        return
    found, counts = np.unique(np.asarray(code, np.int32), return_counts=True)
    shares = 100 * counts / counts.sum()
    bars = right.bar(found, shares, color=color, width=0.8)
    right.set(ylim=(0, 1.18 * shares.max()), ylabel="share (%)")
    right.set_title("codes", loc="left")
    right.grid(False, axis="x")
    if found.min() >= -1 and found.max() <= 1:
        right.bar_label(bars, [f"{share:.1f}" for share in shares], fontsize=6.5, padding=1)
        right.set(xlim=(-1.6, 1.6))
        right.set_xticks(found, [f"{value:+d}" if value else "0" for value in found])
        for edge in (-0.5, 0.5) if 0 in found else ():
            left.axvline(edge, color="#222222", linewidth=0.8, linestyle=":")
