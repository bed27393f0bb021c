"""What happened to the loss during training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.signal import lfilter

from spectra_jax import metrics
from spectra_jax.analysis.plots.style import count_label, family_of, looks, panels, save
from spectra_jax.errors import UserError

INTERVENTIONS = ("peak lowered", "decay removed")
X_LABELS = {"tokens": "training tokens", "step": "optimizer step", "seconds": "wall time (s)"}


def loss_curves(
    runs: Mapping[str, list[dict]],
    path: Path | str | None = None,
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
    with panels() as (figure, axes):
        tops, bottoms, end = [], [], max(xs[-1] for xs, _ in curves.values())
        for (label, records), look in zip(runs.items(), looks(families), strict=True):
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
        axes.xaxis.set_major_formatter(lambda value, _: count_label(value))
        axes.set(xlabel=X_LABELS.get(x, x), ylabel="loss (nats per token)")
        marked = _mark_interventions(axes, runs, x)
        axes.set_title("Training loss (markers: validation)", pad=22 if marked else None)
        axes.legend(loc="upper right")
        return save(figure, path)


def plot_runs(
    workdirs: Sequence[Path | str],
    out: Path | str | None = None,
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
