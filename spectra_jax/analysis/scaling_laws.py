"""Scaling laws: loss against size, against stored bits, against size and tokens, with intervals.

Three forms, x being parameters, stored bits or any other size and D tokens:

    offset   L = A / x^alpha + E                     Spectra's equation 1 (arXiv 2407.12327)
    power    L = A / x^alpha                         its figure 19
    joint    L = A / x^alpha + B / D^beta + E        Chinchilla (arXiv 2203.15556, eq. 2); Spectra 1.1 (2506.23025)

Several groups (families, bit-widths) are fitted at once, with exponents or E shared or free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from spectra_jax.analysis.fitting import Design, by_huber, by_least_squares, intervals
from spectra_jax.errors import UserError, one_of

# Constants of each form: the terms c / x^e first, as pairs, then E.
FORMS = {"offset": ("A", "alpha", "E"), "power": ("A", "alpha"), "joint": ("A", "alpha", "B", "beta", "E")}
SHAREABLE = ("alpha", "beta", "E")
Numbers = np.ndarray | pd.Series | Sequence[float] | float | int


@dataclass(frozen=True)
class Law:
    """One form with the constants of every group: group -> constant -> value."""

    form: str
    constants: Mapping[str, Mapping[str, float]]

    def __call__(self, group: str, x: Numbers, tokens: Numbers | None = None) -> np.ndarray:
        """The loss at sizes `x`, and of the joint form at so many tokens."""
        c = self.constants[one_of(group, self.constants, "group")]
        loss = c["A"] * np.asarray(x, float) ** -c["alpha"] + c.get("E", 0.0)
        if "B" in c:
            if tokens is None:
                raise UserError("a joint law is of size and tokens; say how many tokens")
            loss = loss + c["B"] * np.asarray(tokens, float) ** -c["beta"]
        return np.asarray(loss)

    def size_within(
        self, worse: str, better: str, percent: float | int, tokens: float | int | None = None
    ) -> float:
        """The size from which on the loss of `worse` is at most so many per cent above that of `better` at equal size.

        NaN where that is at no size: not even without end, or already at any that matters (1 to 1e30).
        """

        def excess(log_x: float) -> float:
            x = np.exp(log_x)
            return float(self(worse, x, tokens) - (1 + percent / 100) * self(better, x, tokens))

        ends = 0.0, np.log(1e30)
        if not excess(ends[0]) > 0 > excess(ends[1]):
            return float("nan")
        return float(np.exp(brentq(excess, *ends, xtol=1e-12)))


@dataclass(frozen=True)
class Fit:
    """A law fitted to points.

    constants: one row for every group and constant, with a 95 % interval; samples: the laws of the bootstrap.
    """

    law: Law
    x: str
    constants: pd.DataFrame
    points: pd.DataFrame
    residual: float  # standard deviation, degrees of freedom taken off: nats, with Huber's loss of log L
    samples: tuple[Law, ...]

    def band(self, group: str, x: Numbers, tokens: Numbers | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The middle 95 % of the bootstrap's losses at `x`."""
        low, high = np.percentile([law(group, x, tokens) for law in self.samples], (2.5, 97.5), axis=0)
        return np.asarray(low), np.asarray(high)

    def within(
        self, worse: str, better: str, percents: Sequence[float | int], tokens: float | int | None = None
    ) -> pd.DataFrame:
        """`Law.size_within` for each percentage, and the middle 95 % of the bootstrap's sizes.

        `never` is the share of the bootstrap's laws under which there is no such size; they count as infinite.
        """
        rows = []
        for k in percents:
            found = np.array([law.size_within(worse, better, k, tokens) for law in self.samples] or [np.nan])
            low, high = np.percentile(np.where(np.isnan(found), np.inf, found), (2.5, 97.5), method="nearest")
            size = self.law.size_within(worse, better, k, tokens)
            rows.append((k, size, low, high, float(np.isnan(found).mean())))
        return pd.DataFrame(rows, columns=["percent", self.x, "low", "high", "never"])


def fit(
    points: pd.DataFrame, form: str = "offset", *, x: str = "parameters", y: str = "loss", group: str = "family",
    shared: Sequence[str] = (), method: str = "lm", resamples: int = 400, seed: int = 0,
) -> Fit:
    """Fits a form to a table with columns `x`, `y`, `group`, and "tokens" for the joint form.

    Intervals are bootstrap-t: losses are drawn anew around the fit, with normal errors of the residuals' size, each
    draw is fitted, and its distance from the fit is taken in units of its own standard error.

    Args:
      points: one row for every model; repeated sizes (seeds) are points of their own.
      shared: exponents or E that all groups have in common.
      method: "lm", least squares by Levenberg-Marquardt; "huber", Huber's loss on log L (E is then positive).
      resamples: draws of the bootstrap; 0 for no intervals.

    Raises:
      UserError: an unknown form, method or column; too few points; losses that are missing; models of different data
        or tokenizers; models of different token counts where the form has no tokens.
    """
    names = FORMS[one_of(form, FORMS, "form")]
    if points.empty:
        raise UserError("there are no models to fit a law to")
    solve = {"lm": by_least_squares, "huber": by_huber}[one_of(method, ("lm", "huber"), "method")]
    for name in shared:
        one_of(name, [c for c in names if c in SHAREABLE], "shared constant")
    points = _checked(points, form, x, y, group)
    design = Design.of(points, names, x, group, tuple(shared))
    if len(points) <= design.size:
        raise UserError(
            f"{len(points)} models ({', '.join(points[group].unique())}) are too few for the {design.size} constants "
            f"of the form {form!r}: it needs at least {design.size + 1}"
            + ("" if shared or design.groups == 1 else "; shared=['alpha'] saves a constant for every further group")
        )
    observed = points[y].to_numpy(float)
    theta, spread, error = solve(design, observed, design.starts(observed))
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        noise = rng.normal(0.0, spread, observed.size)
        drawn = design.predict(theta) * np.exp(noise) if method == "huber" else design.predict(theta) + noise
        draws.append(solve(design, drawn, [theta]))
    law = Law(form, design.constants(theta))
    return Fit(
        law, x, intervals(design, theta, error, draws), points, spread,
        tuple(Law(form, design.constants(drawn)) for drawn, _, _ in draws),
    )


def _checked(points: pd.DataFrame, form: str, x: str, y: str, group: str) -> pd.DataFrame:
    """The points, if they can stand in one fit."""
    needed = [x, y, group] + (["tokens"] if form == "joint" else [])
    for column in needed:
        if column not in points:
            raise UserError(f"no column {column!r} to fit; there are {', '.join(map(str, points.columns))}")
    label = points["run"] if "run" in points else points[group]
    for column in needed:
        if points[column].isna().any():
            raise UserError(f"{column!r} is missing for {', '.join(map(str, label[points[column].isna()]))}; finish or "
                            "evaluate these models, or leave them out")
    comparable(points, ("data", "tokenizer") + (() if form == "joint" else ("tokens",)))
    return points.reset_index(drop=True)


def comparable(points: pd.DataFrame, columns: Sequence[str] = ("data", "tokenizer")) -> None:
    """Raises UserError, naming the models, where the losses of a table are on no common scale."""
    label = points["run"] if "run" in points else points["family"]
    for column in columns:
        if column in points and points[column].nunique(dropna=False) > 1:
            kinds = "; ".join(f"{str(value)[:12]}: {', '.join(map(str, label[points[column] == value]))}"
                              for value in points[column].unique())
            remedy = "fit form='joint', or the models of one" if column == "tokens" else "fit those of one"
            raise UserError(f"losses of models of different {column} are on no common scale here ({kinds}); {remedy}")
