"""How every figure looks: one column of print, 8 point type, a colour and a marker for each family.

Figures are built through matplotlib's object interface inside an rc_context: no global state is left behind and no
display is needed. Every function that draws returns the Figure, and writes it where it is given a path (.png, .pdf or
.svg).
"""

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

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
OTHERS = "XP*hp<>d8H"  # markers of families that have no colour of their own, in the order of their appearance
# Where all runs are of one family its one colour would not tell them apart; these do.
RUNS = tuple(FAMILIES.values())
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
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
    "legend.edgecolor": "white",  # opaque: lines that mark events pass behind it
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
SCREEN = 130  # dots per inch in a notebook


def family_of(name: str) -> str:
    """The family that a config's family or a run's name begins with ("trilm-99m"), "" if none."""
    return next((f for f in FAMILIES if name.lower().startswith(f.lower())), "")


def looks(families: Mapping[str, str]) -> list[dict[str, Any]]:
    """How to draw each label: in its family's colour and marker, or its own if all are of one."""
    single = len(families) > 1 and len(set(families.values())) == 1
    looks, used, others = [], Counter(), cycle(OTHERS)
    for i, family in enumerate(families.values()):
        known = RUNS[i % len(RUNS)] if single else FAMILIES.get(family)
        color, marker = known or (OTHER[0], next(others))
        dash = DASHES[used[color] % len(DASHES)]
        looks.append({"color": color, "marker": marker, "linestyle": dash})
        used[color] += 1
    return looks



class Picture(Figure):
    """A Figure that a notebook shows where a cell ends with it, without pyplot."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=SCREEN)
        return data.getvalue()


@contextmanager
def panels(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = HEIGHT, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure in the project's style and its axes: one, or an array (rows, columns). Save it inside the context.

    Args:
      width, height: in inches. options: those of `Figure.subplots`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(width, height), dpi=DPI, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
        yield figure, axes if axes.size > 1 else axes[0, 0]


def legend(figure: Figure, axes: Any, *, inside: int = 3, loc: str = "best") -> None:
    """The legend of some axes: inside where there are few entries, else below the figure, where it covers no curve."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= inside:
        axes.legend(loc=loc)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=6.5)


def log_ticks(axis: Any, ratio: float) -> None:
    """Labels such as 300k and 1M on a logarithmic axis over which values change by `ratio`: more the shorter it is."""
    subs = (1.0, 2.0, 5.0) if ratio < 30 else (1.0, 3.0) if ratio < 3000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: count_label(value))
    axis.set_minor_formatter(NullFormatter())


def count_label(value: float | int) -> str:
    """A number with the units people use for tokens and parameters: 500k, 1.5M, 300B."""
    for unit in ("", "k", "M", "B"):
        if abs(value) < 1000:
            return f"{value:g}{unit}"
        value /= 1000
    return f"{value:g}T"


def save(figure: Figure, path: Path | str | None) -> Figure:
    """The figure; if there is a path, written there: the name appears only once the file is whole.

    Raises:
      UserError: no suffix of a picture, or the file cannot be written.
    """
    if path is None:
        return figure
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
