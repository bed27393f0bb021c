"""Figures of runs and models: loss curves, size against loss, weight histograms.

Every function writes one file (.png, .pdf or .svg, by its suffix) and returns the Figure. Figures
are built through matplotlib's object interface inside an rc_context: no global state is left
behind and no display is needed. They fit one column of print: 3.5 inches wide, 8 point type.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from scipy.signal import lfilter

from spectra_jax import metrics
from spectra_jax.errors import UserError

# Okabe and Ito's palette (Color Universal Design, 2008), told apart under the common colour
# blindnesses; markers say the same again for print without colour.
FAMILIES = {
    "FloatLM": ("#0072B2", "o"),
    "TriLM": ("#D55E00", "^"),
    "BiLM": ("#009E73", "s"),
    "BitNet": ("#CC79A7", "D"),
    "QuantLM": ("#E69F00", "v"),
}
OTHER = ("#555555", "X")
# Where all runs are of one family its one colour would not tell them apart; these do.
RUNS = tuple(FAMILIES.values())
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
INTERVENTIONS = ("peak lowered", "decay removed")
X_LABELS = {"tokens": "training tokens", "step": "optimizer step", "seconds": "wall time (s)"}

STYLE = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "legend.fontsize": 7.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.edgecolor": "white",  # opaque: the lines that mark interventions pass behind it
    "legend.framealpha": 1.0,
    "legend.facecolor": "white",
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.5,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
WIDTH, HEIGHT, DPI = 3.5, 2.6, 300  # inches, inches, dots per inch


def family_of(name: str) -> str:
    """The family that a config's family or a run's name begins with ("trilm-99m"), "" if none."""
    return next((f for f in FAMILIES if name.lower().startswith(f.lower())), "")


def loss_curves(
    runs: Mapping[str, list[dict]],
    path: Path | str,
    *,
    x: str = "tokens",
    smooth: float | int = 0.02,
    families: Mapping[str, str] | None = None,
) -> Figure:
    """Training loss of several runs over each other, validation losses as markers.

    Args:
      runs: label -> the records of that run's metrics.jsonl (see `metrics.read`).
      x: what runs along the x axis: "tokens", "step" or any other value the train records carry.
      smooth: share of a curve that its moving average reaches over; 0 draws the raw curve alone.
      families: label -> family, for colour and marker; by default guessed from the label.

    Vertical lines mark events named in INTERVENTIONS. The y axis leaves out the plunge of the first
    5 % of the x axis. Validation: key "loss" of the eval records, else the first key "*/loss".

    Raises:
      UserError: no runs, or a run without a finite train loss or without values of `x`.
    """
    if not runs:
        raise UserError("no runs to draw")
    families = {label: family_of(label) for label in runs} | dict(families or {})
    curves = {label: _curve(label, records, x) for label, records in runs.items()}
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure()
        tops, bottoms, end = [], [], max(xs[-1] for xs, _ in curves.values())
        for (label, records), look in zip(runs.items(), _looks(families), strict=True):
            xs, losses = curves[label]
            mean = _smoothed(losses, smooth)
            at, validation = _validation(records, x)
            text = label + (f" (validation {validation[-1]:.3f})" if validation else "")
            if smooth:
                axes.plot(xs, losses, color=look["color"], alpha=0.22, linewidth=0.5)
            # No markers on the curve itself, but the legend shows one: it signs the curve too.
            axes.plot(xs, mean, markevery=[], label=text, **look)
            size = min(4.5, max(2.5, 60 / max(1, len(at))))
            axes.plot(at, validation, **look | {"linestyle": "", "markersize": size}, zorder=4)
            tops.append(float(np.interp(0.05 * end, xs, mean)))
            bottoms += [float(mean.min()), *validation]
        margin = 0.05 * max(max(tops) - min(bottoms), 0.1)
        axes.set_ylim(min(bottoms) - margin, max(tops) + margin)
        axes.set_xlim(0, 1.02 * max(end, 1))
        axes.xaxis.set_major_formatter(lambda value, _: _count(value))
        axes.set(xlabel=X_LABELS.get(x, x), ylabel="loss (nats per token)")
        marked = _mark_interventions(axes, runs, x)
        axes.set_title("Training loss (markers: validation)", pad=22 if marked else None)
        axes.legend(loc="upper right")
        return _save(figure, path)


def bits_versus_loss(
    rows: Sequence[Mapping[str, Any]], path: Path | str, *, accounting: str = "stored bits"
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
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure()
        families = {row["family"]: family_of(row["family"]) for row in rows}
        for family, look in zip(families, _looks(families), strict=True):
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
        axes.xaxis.set_major_locator(LogLocator(subs=_ticks(max(bits) / min(bits))))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(y=0.15)
        axes.set(title="Model size against validation loss", xlabel=f"model size ({accounting})",
                 ylabel="loss (nats per token)")
        axes.legend(loc="best")
        return _save(figure, path)


def weight_histograms(
    latent: Mapping[str, Float[np.ndarray, "..."]],
    codes: Mapping[str, Int[np.ndarray, "..."] | None],
    path: Path | str,
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
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 1.15 * len(latent)), dpi=DPI, layout="constrained")
        figure.suptitle("Latent weights and their codes", fontsize=8.5)
        grid = figure.subplots(len(latent), 2, squeeze=False, width_ratios=(2.2, 1))
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
        return _save(figure, path)


def plot_runs(
    workdirs: Sequence[Path | str],
    out: Path | str,
    *,
    x: str = "tokens",
    smooth: float | int = 0.02,
) -> Figure:
    """Loss curves of training runs over each other, written to `out` (`spectra plot WORKDIR...`).

    Names and families come from each workdir's config.json where it has them, else from the folder.

    Raises:
      UserError: a workdir is missing, has no metrics or no train losses, or its files are damaged.
    """
    runs: dict[str, list[dict]] = {}
    families = {}
    for workdir in map(Path, workdirs):
        if not workdir.is_dir():
            raise UserError(f"no folder {workdir}; give the workdirs of training runs")
        if not (workdir / metrics.FILE).is_file():
            raise UserError(f"{workdir} holds no {metrics.FILE}; give workdirs of training runs")
        config = _config(workdir)
        folder = workdir.resolve().name
        label = str(config.get("name") or folder)
        if label in runs:
            label = f"{label} ({folder})"
        if label in runs:
            label = f"{label} #{len(runs) + 1}"
        runs[label] = metrics.read(workdir)
        families[label] = family_of(str(config.get("family", ""))) or family_of(label)
    return loss_curves(runs, out, x=x, smooth=smooth, families=families)


def _config(workdir: Path) -> dict[str, Any]:
    """The run's config.json, {} if it has none."""
    path = workdir / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore or remove it") from error
    return config if isinstance(config, dict) else {}


def _curve(label: str, records: list[dict], x: str) -> tuple[np.ndarray, np.ndarray]:
    """x values and finite losses of the train records, in the order of x."""
    train = [r for r in records if r.get("kind") == "train" and r.get("loss") is not None]
    if not train:
        raise UserError(f"run {label!r} has no train losses yet; train it for a few steps first")
    if not all(isinstance(record.get(x), (int, float)) for record in train):
        known = sorted(k for k, v in train[0].items() if isinstance(v, (int, float)))
        raise UserError(f"run {label!r} has no {x!r} to draw against; it has {', '.join(known)}")
    points = np.array([(record[x], record["loss"]) for record in train], np.float64)
    points = points[np.argsort(points[:, 0], kind="stable")]
    return points[:, 0], points[:, 1]


def _place(records: list[dict], chosen: list[dict], x: str) -> list[float]:
    """x of `chosen` records; where they lack it, what the train records say at their step."""
    known = sorted((r["step"], r[x]) for r in records if r.get("kind") == "train" and x in r)
    steps, values = zip(*known, strict=True)
    return [float(r[x]) if x in r else float(np.interp(r["step"], steps, values)) for r in chosen]


def _validation(records: list[dict], x: str) -> tuple[list[float], list[float]]:
    """x values and losses of the eval records."""
    evals = [record for record in records if record.get("kind") == "eval"]
    names = [key for record in evals for key in record if key == "loss" or key.endswith("/loss")]
    name = "loss" if "loss" in names else next(iter(names), "loss")
    evals = [record for record in evals if record.get(name) is not None]
    return _place(records, evals, x), [float(record[name]) for record in evals]


def _smoothed(losses: np.ndarray, share: float | int) -> np.ndarray:
    """Exponential average over `share` of the points, to both sides: one side alone would lag."""
    decay = 1 - 1 / max(1.0, share * len(losses))

    def both_sides(values: np.ndarray) -> np.ndarray:
        past, future = (lfilter([1.0], [1.0, -decay], v) for v in (values, values[::-1]))
        return past + future[::-1] - values

    return both_sides(losses) / both_sides(np.ones_like(losses))


def _looks(families: Mapping[str, str]) -> list[dict[str, Any]]:
    """How to draw each label: in its family's colour and marker, or its own if all are of one."""
    single = len(families) > 1 and len(set(families.values())) == 1
    looks, used = [], Counter()
    for i, family in enumerate(families.values()):
        color, marker = RUNS[i % len(RUNS)] if single else FAMILIES.get(family, OTHER)
        dash = DASHES[used[color] % len(DASHES)]
        looks.append({"color": color, "marker": marker, "linestyle": dash})
        used[color] += 1
    return looks


def _mark_interventions(axes: Axes, runs: Mapping[str, list[dict]], x: str) -> bool:
    """A labelled vertical line per intervention, once where runs share it; whether there is any."""
    marks = {}
    for records in runs.values():
        events = [r for r in records if r["kind"] == "event" and r.get("name") in INTERVENTIONS]
        for event, at in zip(events, _place(records, events, x), strict=True):
            marks[event["name"], round(at)] = at
    for (name, _), at in marks.items():
        axes.axvline(at, color="#777777", linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
        axes.annotate(name.replace(" ", "\n"), (at, 1.01), xycoords=("data", "axes fraction"),
                      ha="center", va="bottom", fontsize=6.5, color="#555555")
    return bool(marks)


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


def _ticks(ratio: float | int) -> tuple[float, ...]:
    """Multiples of powers of ten to label: more of them the shorter the axis."""
    return (1.0, 2.0, 5.0) if ratio < 30 else (1.0, 3.0) if ratio < 3000 else (1.0,)


def _count(value: float | int) -> str:
    """A tick label with the units people use for tokens: 500k, 1.5M, 300B."""
    for unit in ("", "k", "M", "B"):
        if abs(value) < 1000:
            return f"{value:g}{unit}"
        value /= 1000
    return f"{value:g}T"


def _new_figure() -> tuple[Figure, Axes]:
    """A figure of one panel."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path | str) -> Figure:
    """Write the figure; its name appears only once the file is whole."""
    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{path} has no picture suffix; use .png, .pdf or .svg")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
    return figure
